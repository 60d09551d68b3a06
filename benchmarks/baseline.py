"""The same checkpoint in one process of transformers, for comparison.

Each measurement runs in a process of its own, started by :func:`measure`, on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import prompts, resident_mb

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 600.0


def measure(folder: Path, kind: str, streams: int, tokens: int, rounds: int) -> dict[str, float]:
    """Generate in a fresh process; returns median tokens per second, and resident memory."""
    return measure_all(folder, kind, [str(streams)], tokens, rounds)[str(streams)]


def measure_all(
    folder: Path,
    kind: str,
    streams: Sequence[str],
    tokens: int,
    rounds: int,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Return :func:`measure`'s figures by number of streams, of one process on a device.

    ``device`` is ``cpu`` or ``accelerator``. On an accelerator there are ``device_bytes`` too, the
    most that torch had allocated there.
    """
    arguments = [str(folder), kind, str(tokens), str(rounds), *streams, "--device", device]
    return run_module("benchmarks.baseline", arguments, {})


def run_module(module: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a benchmark's module in a process; returns the JSON of the last line it prints.

    Raises ``RuntimeError`` with the end of its stderr when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""Generates greedily a number of tokens for each prompt, and returns them."""


def transformers_generate(
    folder: Path, experts: str, device: torch.device, dtype: torch.dtype | None = None
) -> Generate:
    """Load the model, by default in bf16; returns a function that generates on the device.

    The function returns when the device is done.
    """
    import psutil
    import torch
    from transformers import MixtralForCausalLM

    torch.set_num_threads(psutil.cpu_count() or 1)
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.bfloat16, experts_implementation=experts
    )
    model = model.eval().to(device)

    def generate(given: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(given, device=device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
        )
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        generated: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return generated

    return generate


def rates_of(generate: Generate, streams: int, tokens: int, rounds: int) -> list[float]:
    """Return each round's tokens per second; a first one of two tokens does not count."""
    given = prompts(streams)
    generate(given, 2)
    rates = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        generate(given, tokens)
        rates.append(streams * tokens / (time.perf_counter() - started_s))
    return rates


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure one kind in this process; returns the figures by number of streams."""
    from cluster.device import device_of

    device = device_of(options.device, 0, "--device")
    generate = transformers_generate(options.folder, options.kind, device)
    measured = {}
    for streams in options.streams:
        rates = rates_of(generate, int(streams), options.tokens, options.rounds)
        measured[streams] = {
            "tokens_per_s": statistics.median(rates),
            "rss_mb": resident_mb(os.getpid()),
        }
        if device.type != "cpu":
            import torch

            measured[streams]["device_bytes"] = torch.accelerator.max_memory_allocated()
    return measured


def parser() -> argparse.ArgumentParser:
    """Return the parser of the process's command line."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("folder", type=Path)
    made.add_argument("kind")
    for number in ("tokens", "rounds"):
        made.add_argument(number, type=int)
    made.add_argument("streams", nargs="+")
    made.add_argument("--device", choices=("cpu", "accelerator"), default="cpu")
    return made


def main() -> None:
    """Measure one kind, in this process; prints a line of JSON."""
    print(json.dumps(run(parser().parse_args())))


if __name__ == "__main__":
    main()
