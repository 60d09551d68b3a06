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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import SIZES, prompts, resident_mb

TIMEOUT_S = 600.0


def kinds() -> tuple[str, ...]:
    """Return what can be compared with here: transformers' experts, and vLLM where installed."""
    transformers = ("grouped_mm", "eager")
    return (*transformers, "vllm") if importlib.util.find_spec("vllm") else transformers


def measure(folder: Path, kind: str, streams: int, tokens: int, rounds: int) -> dict[str, float]:
    """Generate in a fresh process; returns median tokens per second, and resident memory."""
    numbers = [str(number) for number in (streams, tokens, rounds)]
    return run_module("benchmarks.baseline", [str(folder), kind, *numbers], {})


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


def transformers_generate(folder: Path, experts: str, streams: int) -> Callable[[int], None]:
    """Load the model; returns what generates a number of tokens greedily for all streams."""
    import psutil
    import torch
    from transformers import MixtralForCausalLM

    torch.set_num_threads(psutil.cpu_count() or 1)
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=experts
    ).eval()
    ids = torch.tensor(prompts(streams))

    def generate(tokens: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
        )

    return generate


def vllm_generate(folder: Path, streams: int) -> Callable[[int], None]:
    """As :func:`transformers_generate`, with vLLM; its import fails where it is not installed."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(folder), dtype="bfloat16", max_model_len=SIZES["max_position_embeddings"])
    requests = [{"prompt_token_ids": ids} for ids in prompts(streams)]

    def generate(tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        llm.generate(requests, sampling, use_tqdm=False)

    return generate


def main() -> None:
    """Measure one kind, in this process; prints a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind")
    for number in ("streams", "tokens", "rounds"):
        parser.add_argument(number, type=int)
    options = parser.parse_args()
    if options.kind == "vllm":
        generate = vllm_generate(options.folder, options.streams)
    else:
        generate = transformers_generate(options.folder, options.kind, options.streams)
    generate(2)
    rates = []
    for _ in range(options.rounds):
        started_s = time.perf_counter()
        generate(options.tokens)
        rates.append(options.streams * options.tokens / (time.perf_counter() - started_s))
    result = {"tokens_per_s": statistics.median(rates), "rss_mb": resident_mb(os.getpid())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
