"""What answers of a form cost: tokens a second of constrained streams beside plain ones.

    python -m benchmarks.forms [--streams 32] [--tokens 64] [--rounds 5] [--json FILE]

Serves the bundled model, and then a random one of 111 M parameters with its vocabulary. All streams
generate at once: without a form, by a regex, and by a JSON schema, by turns. Every answer has the
same number of tokens. Promised for both: with a form at least 0.9 times as many tokens a second.
Clients share the cores with the deployment. The exit status is 1 where the promise is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    MODEL,
    Figure,
    Verdict,
    finish,
    machine,
    make_checkpoint,
    output_options,
    progress,
    show,
    show_verdicts,
)
from benchmarks.serve import served

if TYPE_CHECKING:
    from router.client import AsyncClient

LEAST = 0.9
"""How many times as many tokens a second there are with a form, at least."""
NONE = "no form"
FORMS: Mapping[str, Mapping[str, Any] | None] = {
    NONE: None,
    "regex": {"regex": "[A-Z][a-z ]{2000}"},
    "JSON schema": {
        "json": {
            "type": "array",
            "minItems": 500,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                "required": ["name", "age"],
                "additionalProperties": False,
            },
        }
    },
}
PROMPT = "And the LORD said"
MODELS = ("bundled", "111 M")
BUNDLED = Path(__file__).parents[1] / "deploy" / "models" / "mesh-tiny"


async def _round(client: AsyncClient, form: Any, streams: int, tokens: int) -> float:
    """Return the tokens a second of so many streams at once."""
    from router.client import Sampling

    async def one(seed: int) -> None:
        sampling = Sampling(
            max_tokens=tokens, seed=seed, ignore_eos=form is None, structured_outputs=form
        )
        [reply] = await client.generate(PROMPT, sampling, timeout_s=120.0)
        if len(reply.token_ids) != tokens:
            raise RuntimeError(f"an answer has {len(reply.token_ids)} tokens, not {tokens}")

    begun_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for seed in range(streams):
            group.create_task(one(seed))
    return streams * tokens / (time.perf_counter() - begun_s)


async def _rounds(
    address: str, options: argparse.Namespace, begin: Callable[[str], None]
) -> dict[str, list[float]]:
    from router.client import AsyncClient

    rates: dict[str, list[float]] = {name: [] for name in FORMS}
    async with AsyncClient(address, retry=None) as client:
        for number in range(options.rounds + 1):  # the first loads tokenizer and grammars
            for name, form in FORMS.items():
                begin(name)
                rate = await _round(client, form, options.streams, options.tokens)
                if number:
                    rates[name].append(rate)
    return rates


def _make_random(folder: Path) -> None:
    """Save a random model that takes and gives the bundled model's tokens."""
    make_checkpoint(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    from router.app import build

    rates = {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        progress("forms", len(MODELS) * len(FORMS) * (options.rounds + 1)) as begin,
    ):
        _make_random(Path(temporary))
        for name, folder in zip(MODELS, (BUNDLED, Path(temporary)), strict=True):
            args = {"models": [{"id": MODEL, "path": str(folder)}]}
            with served(build, args) as ports:
                rates[name] = asyncio.run(_rounds(ports.grpc_address, options, begin))
    return {
        "benchmark": "forms",
        "machine": machine(),
        "streams": options.streams,
        "tokens": options.tokens,
        "tokens_per_s": rates,
    }


def ratio(result: dict[str, Any], model: str, form: str) -> float:
    """Return the median, over the rounds, of the rate with a form over that without."""
    rates = result["tokens_per_s"][model]
    pairs = zip(rates[form], rates[NONE], strict=True)
    return statistics.median(with_form / without for with_form, without in pairs)


def report(result: dict[str, Any]) -> bool:
    """Print the tables; returns whether the promise is kept."""
    rows = [
        (model, form, f"{statistics.median(rates[form]):.0f}", f"{ratio(result, model, form):.3f}")
        for model, rates in result["tokens_per_s"].items()
        for form in FORMS
    ]
    columns = ["model", "answers", "tokens/s", "of no form"]
    show(f"{result['streams']} streams", rows, columns)
    verdicts = [
        Verdict(f"{model}, {form}", f"{found:.3f}", f"≥ {LEAST:g}", found >= LEAST)
        for model in MODELS
        for form in filter(FORMS.get, FORMS)
        for found in [ratio(result, model, form)]
    ]
    show_verdicts("promise: tokens/s of no form", verdicts)
    return all(verdict.is_kept for verdict in verdicts)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    output_options(parser)
    options = parser.parse_args()
    result = run(options)
    is_kept = report(result)
    figures = {
        f"{model}, {form} / {NONE}": Figure(ratio(result, model, form), "higher")
        for model in MODELS
        for form in filter(FORMS.get, FORMS)
    }
    return finish(result, figures, options) or int(not is_kept)


if __name__ == "__main__":
    sys.exit(main())
