"""Processor time that checking a request costs the gateway's event loop, without a deployment.

    python -m benchmarks.validation [--json FILE]

Prints the time from a parsed body to a checked request, for each kind of request. Then it sends the
HTTP app 10,000 requests that a key's quota refuses, and in turns 10,000 with a wrong key, and
compares their processor time. The exit status is 1 when one takes more than promised.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
import timeit
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.common import MODEL, Verdict, command, show_verdicts, write_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

    from router.gateway.input.tokenizer import Tokenizer

MODEL_PATH = Path("deploy/models/mesh-tiny")
VOCAB = 2000
"""Token ids that the bundled model has for certain."""
PROMISED_US = 50.0
"""For a request, with any number of fields."""
SHORT, LONG, TOKENS = 16, 960, 32
TEXT = "In the beginning God created the heaven and the earth."
REPEATS = 7
PROMISED_RATIO = 1.2
"""Of a refused request to one with a wrong key."""
REFUSED, AT_ONCE = 10_000, 250
"""Requests of each kind, and how many of them wait for their answers at one time."""
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


def refused_us(count: int = REFUSED) -> dict[str, float]:
    """Return µs of processor time by the status of the answer: 429 by a quota, 401 by a wrong key.

    Each is an answer of the HTTP app to one of ``count`` requests of its kind. A wrong key's comes
    after a second, in which others are answered.
    """
    from router.gateway.metrics import Metrics
    from router.security.access import Access
    from router.security.keyring import Keyring
    from router.security.keys import Role
    from router.security.keys_file import add_key
    from router.security.limits import KeyLimits
    from tests.unit.gateway_fakes import FakeUpstream, http_app, says

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.yaml"
        limits = KeyLimits(requests_per_s=1)
        keys = {429: add_key(file, "guest", [Role.INFERENCE], limits), 401: "em-wrong"}
        access = Access(Keyring(file), Metrics().refused_caller)
        app = http_app(FakeUpstream(says("")), access=access, clock=lambda: 0.0)
        asyncio.run(_answers(app, keys[429], 1))  # of this second the only one that is let in
        spent_s = dict.fromkeys(keys, 0.0)
        for begin in range(0, count, AT_ONCE):
            for status, key in keys.items():
                began_s = time.process_time()
                number = min(AT_ONCE, count - begin)
                statuses = asyncio.run(_answers(app, key, number))
                spent_s[status] += time.process_time() - began_s
                if statuses != {status: number}:
                    raise RuntimeError(f"answered {dict(statuses)} instead of {number} {status}")
    return {str(status): one / count * 1e6 for status, one in spent_s.items()}


async def _answers(app: ASGIApp, key: str, count: int) -> Counter[int]:
    """Return how many answers to so many requests of one key have each status."""
    statuses: Counter[int] = Counter()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses[message["status"]] += 1

    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"authorization", f"Bearer {key}".encode()),
    ]
    scope: Scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": headers,
        "query_string": b"",
    }  # fmt: skip
    await asyncio.gather(*(app({**scope}, receive, send) for _ in range(count)))
    return statuses


def verdicts(measured: Mapping[str, float], refused: Mapping[str, float]) -> list[Verdict]:
    """Judge the time of each kind of request and of refusals, in µs."""
    ratio = refused["429"] / refused["401"]
    return [
        *(
            Verdict(kind, f"{us:.1f} µs", f"at most {PROMISED_US:g} µs", us <= PROMISED_US)
            for kind, us in measured.items()
        ),
        Verdict(
            "refused by a quota, beside a wrong key",
            f"{refused['429']:.1f} µs, {refused['401']:.1f} µs: {ratio:.2f} times",
            f"at most {PROMISED_RATIO:g} times",
            ratio <= PROMISED_RATIO,
        ),
    ]


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    options = command("validation", __doc__).parse_args()
    logging.getLogger("expertmesh.security").setLevel(logging.ERROR)  # it tells of wrong keys
    measured, refused = run(MODEL_PATH), refused_us()
    write_json("validation", {"us": measured, "refused_us": refused}, options.json)
    return show_verdicts("checking a request", verdicts(measured, refused))


if __name__ == "__main__":
    sys.exit(main())
