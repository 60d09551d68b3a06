"""Processor time that checking a request costs the gateway's event loop, without a deployment.

    python -m benchmarks.validation [--json FILE]

Prints the time from a parsed body to a checked request, for each kind of request. The exit status
is 1 when one takes more than promised.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.common import MODEL, Verdict, command, show_verdicts, write_json

if TYPE_CHECKING:
    from router.gateway.input.tokenizer import Tokenizer

MODEL_PATH = Path("deploy/models/mesh-tiny")
VOCAB = 2000
"""Token ids that the bundled model has for certain."""
PROMISED_US = 50.0
"""For a request, with any number of fields."""
SHORT, LONG, TOKENS = 16, 960, 32
TEXT = "In the beginning God created the heaven and the earth."
REPEATS = 7
EVERY_FIELD: dict[str, Any] = {
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "seed": 7,
    "stop": ["\n\n", "The end"],
    "logprobs": 5,
    "n": 2,
    "timeout_s": 30.0,
    "on_expert_loss": "strict",
    "priority": 1,
}


class Tokenized:
    """A tokenizer that has done its work: it knows one text's tokens."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.max_token_bytes = tokenizer.max_token_bytes
        self._ids = tokenizer.encode(text)

    def encode(
        self, text: str, add_special_tokens: bool = True, where: str = "prompt"
    ) -> list[int]:
        """Return the tokens of the one text."""
        return self._ids


def run(folder: Path) -> dict[str, float]:
    """Return µs a request by kind, from the parsed body to the checked request.

    A text's tokens are there already: to find them is work for the answer, not checking.
    """
    from router.config.deployment import GatewayConfig, parse_args
    from router.gateway.http.openai.completions import parse_completion
    from router.gateway.input.tokenizer import GatewayModel, Tokenizer
    from router.gateway.input.validate import Validator
    from router.served import inspect_models, language_models

    [info] = language_models(
        inspect_models(parse_args({"models": [{"id": MODEL, "path": str(folder.resolve())}]}))
    )
    tokenizer = Tokenized(Tokenizer.load(str(folder), info.eos_token_ids), TEXT)
    model = GatewayModel(info, cast("Tokenizer", tokenizer))
    validator = Validator({MODEL: model}, GatewayConfig())

    def check_us(body: dict[str, Any]) -> float:
        return least_us(lambda: parse_completion(body, validator, "id"))

    return {
        f"{SHORT} token ids": check_us(_body(_ids(SHORT))),
        f"{LONG} token ids": check_us(_body(_ids(LONG))),
        f"{SHORT} token ids, every field": check_us({**_body(_ids(SHORT)), **EVERY_FIELD}),
        "a text": check_us(_body(TEXT)),
    }


def _body(prompt: list[int] | str) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _ids(count: int) -> list[int]:
    return [2 + 31 * place % (VOCAB - 2) for place in range(count)]


def least_us(work: Callable[[], object]) -> float:
    """Return the µs of processor time that ``work`` takes: the least mean of some runs.

    What else runs on the machine does not count, but it makes caches cold.
    """
    timer = timeit.Timer(work, timer=time.process_time)
    number, _ = timer.autorange()
    return min(timer.repeat(REPEATS, number)) / number * 1e6


def verdicts(measured: Mapping[str, float]) -> list[Verdict]:
    """Judge the time of each kind of request, in µs."""
    return [
        Verdict(kind, f"{us:.1f} µs", f"at most {PROMISED_US:g} µs", us <= PROMISED_US)
        for kind, us in measured.items()
    ]


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    options = command("validation", __doc__).parse_args()
    measured = run(MODEL_PATH)
    write_json("validation", {"us": measured}, options.json)
    return show_verdicts("checking a request", verdicts(measured))


if __name__ == "__main__":
    sys.exit(main())
