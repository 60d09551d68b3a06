"""What it takes to choose the tokens of a step: drawing them, and following their grammars.

    python -m benchmarks.sampling [--rounds 20] [--json FILE]

Draws the tokens of a step as a router's engine does, on one thread, from logits of a normal
distribution times 3, which is flatter than a language model's. Then 32 choices of the bundled model
follow a grammar, as beside a step; the time is the processor's, without the choosing of tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, finish, machine, output_options, progress, show

STEPS = {"32 x 4,096": (32, 4096), "32 x 32,000": (32, 32_000), "1 x 151,936": (1, 151_936)}
"""Rows and vocabulary sizes."""
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 20, top-p 0.8": {"top_k": 20, "top_p": 0.8},
}
FOLDER = Path(__file__).parent.parent / "deploy" / "models" / "mesh-tiny"
CHOICES = 32


def draw_call(num_rows: int, vocab_size: int, filters: dict[str, Any]) -> Callable[[], object]:
    """Return a call that draws the tokens of a step."""
    import torch

    from router.engine.batch import sampling_of
    from router.engine.sampling import Draw, read, sample
    from router.messages.request import SamplingParams

    torch.set_num_threads(1)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(64, temperature=1.0, seed=row, **filters) for row in range(num_rows)]
    draws = [Draw(each, choice=0, position=7) for each in params]

    def call() -> object:
        sampling = sampling_of(draws)
        return read(sample(logits, sampling.tensors, sampling.logprob_sizes), sampling)

    return call


def draw_ms(rounds: int) -> dict[str, dict[str, float]]:
    """Return the median time of drawing a step's tokens, in ms, by filter and step."""
    found: dict[str, dict[str, float]] = {}
    for filters, given in FILTERS.items():
        found[filters] = {}
        for step, sizes in STEPS.items():
            call, times_s = draw_call(*sizes, given), []
            for number in range(rounds + 1):
                begun_s = time.perf_counter()
                call()
                if number:  # the first finds memory
                    times_s.append(time.perf_counter() - begun_s)
            found[filters][step] = 1e3 * statistics.median(times_s)
    return found


def follow_us(form: str, rounds: int) -> float:
    """Return the processor time of following one choice by one token, in µs."""
    import numpy as np

    from benchmarks.forms import FORMS
    from router.engine.constraints import Grammars
    from router.engine.token_masks import flags_of
    from router.gateway.grammar import check_grammar
    from router.gateway.tokenizer import Tokenizer

    config = json.loads((FOLDER / "config.json").read_text())
    vocab_size, eos = config["vocab_size"], (config["eos_token_id"],)
    tokenizer = Tokenizer.load(str(FOLDER), eos)
    grammar = check_grammar({"structured_outputs": FORMS[form]}, str, eos)
    grammars = Grammars(lambda: tokenizer.vocabulary(vocab_size, eos), vocab_size)
    random, choosing_s = np.random.default_rng(0), 0.0
    try:
        choices = [grammars.begin(grammar) for _ in range(CHOICES)]
        masks = [choice.allowed(30.0) for choice in choices]
        begun_s = time.process_time()
        for _ in range(rounds):
            chosen_s = time.thread_time()
            flags = [flags_of(each, vocab_size) for each in masks if each is not None]
            chosen = [int(random.choice(np.flatnonzero(each))) for each in flags]
            choosing_s += time.thread_time() - chosen_s
            for choice, token_id in zip(choices, chosen, strict=True):
                choice.read(token_id)
            masks = [choice.allowed(30.0) for choice in choices]
        return 1e6 * (time.process_time() - begun_s - choosing_s) / (rounds * CHOICES)
    finally:
        grammars.close()


def run(rounds: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    from benchmarks.forms import FORMS

    with progress("sampling", 3) as begin:
        begin("drawing")
        drawn = draw_ms(rounds)
        followed = {}
        for form in filter(FORMS.get, FORMS):
            begin(form)
            followed[form] = follow_us(form, 5 * rounds)
    return {
        "benchmark": "sampling",
        "machine": machine(),
        "rounds": rounds,
        "draw_ms": drawn,
        "follow_us": followed,
    }


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        (filters, *(f"{found[step]:.2f}" for step in STEPS))
        for filters, found in result["draw_ms"].items()
    ]
    show("drawing, ms a step; rows x vocabulary", rows, ["filter", *STEPS])
    rows = [(form, f"{found:.0f}") for form, found in result["follow_us"].items()]
    show(f"following {CHOICES} choices", rows, ["form", "processor µs a row"])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    output_options(parser)
    options = parser.parse_args()
    result = run(options.rounds)
    report(result)
    figures = {
        f"{filters}, {step}": Figure(ms, "lower")
        for filters, found in result["draw_ms"].items()
        for step, ms in found.items()
    }
    return finish(result, figures, options)


if __name__ == "__main__":
    sys.exit(main())
