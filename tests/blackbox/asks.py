"""What clients ask, each request a function of the seed and its number, and what comes of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from tests.blackbox.machines import MACHINES, MODEL

PROMPTS, SHARED_TOKENS, VOCAB = 16, 40, range(3, 2000)
TIMEOUT_S, HASTY_S = 60.0, (0.02, 0.4)
SAMPLING = ("max_tokens", "temperature", "seed", "n", "logprobs", "ignore_eos")
REFUSED, BROKEN = "connection refused", "connection broken"
"""What a client sees where no server answers: from the first on, or no longer."""
MISTAKES: dict[str, tuple[Any, str]] = {
    "temperature": (-1.0, "invalid_argument"),
    "max_tokens": (100_000, "invalid_argument"),
    "on_expert_loss": ("maybe", "invalid_argument"),
    "model": ("nobody", "not_found"),
    "key": ("em-nobody", "unauthenticated"),
}
"""Wrong values by their field, with the end of the code that each gets."""


class Kind(StrEnum):
    """How a client behaves: the resuming ones leave their stream, and resume at another machine."""

    UNARY = "unary"
    STREAM = "stream"
    RESUME = "resume"
    DOUBT = "resume, said to be inexact"
    HASTY = "short deadline"
    WRONG = "invalid"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``machines`` are asked in this order, the next one only to resume.

    A client that leaves does so after ``leaves_after`` tokens of all choices. ``body`` are the
    fields that HTTP's body and gRPC's messages have alike, and the key where it is wrong.
    ``mistake`` is the field that is wrong, if one is.
    """

    number: int
    kind: Kind
    machines: tuple[int, ...]
    is_http: bool
    is_streamed: bool
    prompt: tuple[int, ...]
    body: Mapping[str, Any]
    timeout_s: float
    leaves_after: int
    mistake: str


def prompts_of(seed: int) -> list[tuple[int, ...]]:
    """Return the prompts of a run, some of which begin alike, as chats do."""
    source = random.Random(f"{seed}: prompts")
    shared = source.choices(VOCAB, k=SHARED_TOKENS)
    sizes = [source.randint(2, 40) for _ in range(PROMPTS)]
    return [(*(shared if size % 2 else ()), *source.choices(VOCAB, k=size)) for size in sizes]


def draw(seed: int, number: int) -> Ask:
    """Return request ``number`` of a run."""
    source = random.Random(f"{seed}: request {number}")
    kind = source.choices(list(Kind), (5, 5, 3, 1, 2, 2))[0]
    resumes, is_hasty = kind in (Kind.RESUME, Kind.DOUBT), kind is Kind.HASTY
    n, max_tokens = source.choice((1, 1, 1, 2, 3)), source.randint(8, 96)
    mistake = source.choice(list(MISTAKES)) if kind is Kind.WRONG else ""
    losses = ("strict", "strict", "next_expert", "drop")
    body = {
        "model": MODEL,
        "on_expert_loss": "strict" if kind is Kind.DOUBT else source.choice(losses),
        "max_tokens": max_tokens * (4 if is_hasty else 1),
        "temperature": source.choice((0.0, 0.0, 0.7, 1.2)),
        "seed": source.randrange(1000),
        "n": n,
        "logprobs": source.choice((None, 0, 3)),
        "ignore_eos": source.random() < 0.5,
    }
    return Ask(
        number=number,
        kind=kind,
        machines=tuple(source.sample(MACHINES, len(MACHINES))),
        is_http=not resumes and source.random() < 0.5,
        is_streamed=resumes or kind is Kind.STREAM or (is_hasty and source.random() < 0.5),
        prompt=source.choice(prompts_of(seed)),
        body=body | ({mistake: MISTAKES[mistake][0]} if mistake else {}),
        timeout_s=source.uniform(*HASTY_S) if is_hasty else TIMEOUT_S,
        leaves_after=source.randint(1, n * max_tokens // 2) if resumes else 0,
        mistake=mistake,
    )


@dataclass(slots=True)
class Choice:
    """What has come of one choice.

    ``told`` is whether it is exact, as it was said after so many tokens: by the servers, and by a
    client that has ``doubted``.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    text: str = ""
    told: list[tuple[int, bool]] = field(default_factory=list)
    finish_reason: str | None = None
    identity: str = ""
    doubted: bool = False

    def add(self, token_ids: Any, logprobs: Any, text: str, exact: Any, finish_reason: Any) -> None:
        """Take a piece; an ``exact`` of ``None`` says nothing."""
        self.told += [] if exact is None else [(len(self.token_ids), exact)]
        self.token_ids += tuple(token_ids)
        self.logprobs += tuple(logprobs)
        self.text += text
        self.finish_reason = finish_reason or self.finish_reason

    @property
    def num_exact(self) -> int:
        """The tokens before the first that was said to be inexact."""
        return next((count for count, exact in self.told if not exact), len(self.token_ids))


class Failure(NamedTuple):
    """An error that a machine gave, or the lack of a connection, to one attempt."""

    machine: int
    began_s: float
    at_s: float
    code: str
    param: str
    message: str


@dataclass(slots=True)
class Answer:
    """All that came; ``usage`` has the tokens of the prompt, of all choices, and of both.

    ``failures`` are those of all attempts; the last one ended the answer if ``has_failed``.
    """

    ask: Ask
    began_s: float
    choices: list[Choice]
    ended_s: float = 0.0
    usage: tuple[int, ...] = ()
    failures: list[Failure] = field(default_factory=list)
    has_failed: bool = False

    @property
    def num_tokens(self) -> int:
        """The tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)
