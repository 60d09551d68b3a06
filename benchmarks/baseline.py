"""What the cluster is compared with: the same checkpoint generated from in one process.

Each measurement runs in a process of its own, started by :func:`measure`, on all cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import SIZES, prompts, resident_mb

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 600.0


def kinds() -> tuple[str, ...]:
    """Return what can be compared with here: transformers' experts, and vLLM where installed."""
    transformers = ("grouped_mm", "eager")
    return (*transformers, "vllm") if importlib.util.find_spec("vllm") else transformers


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


Generate = Callable[[int, int], None]
"""Generates greedily for a number of streams a number of tokens each."""


def transformers_generate(folder: Path, experts: str, device: torch.device) -> Generate:
    """Load the model to a device; returns what generates there, and waits for the device."""
    import psutil
    import torch
    from transformers import MixtralForCausalLM

    torch.set_num_threads(psutil.cpu_count() or 1)
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=experts
    )
    model = model.eval().to(device)

    def generate(streams: int, tokens: int) -> None:
        ids = torch.tensor(prompts(streams), device=device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
        )
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return generate


def vllm_generate(folder: Path) -> Generate:
    """As :func:`transformers_generate`, with vLLM; its import fails where it is not installed."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(folder), dtype="bfloat16", max_model_len=SIZES["max_position_embeddings"])

    def generate(streams: int, tokens: int) -> None:
        requests = [{"prompt_token_ids": ids} for ids in prompts(streams)]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        llm.generate(requests, sampling, use_tqdm=False)

    return generate


def rates_of(generate: Generate, streams: int, tokens: int, rounds: int) -> list[float]:
    """Return each round's tokens per second; a first one of two tokens does not count."""
    generate(streams, 2)
    rates = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        generate(streams, tokens)
        rates.append(streams * tokens / (time.perf_counter() - started_s))
    return rates


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure one kind in this process; returns the figures by number of streams."""
    from cluster.device import device_of

    device = device_of(options.device, 0, "--device")
    if options.kind == "vllm":
        generate = vllm_generate(options.folder)
    else:
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
