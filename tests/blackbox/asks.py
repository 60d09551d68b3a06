"""What clients ask: each request is a function of the seed and its number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.blackbox.machines import MACHINES, MODEL

PROMPTS, SHARED_TOKENS, VOCAB = 16, 40, range(3, 2000)
TIMEOUT_S, HASTY_S = 60.0, (0.02, 0.4)


class Kind(StrEnum):
    """How a client behaves."""

    UNARY = "unary"
    STREAM = "stream"
    RESUME = "resume"
    """Leaves its stream and resumes it at another machine."""
    DOUBT = "resume as inexact"
    """The same, but says that what it has was not exact."""
    HASTY = "short deadline"
    WRONG = "invalid"


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong field, and the error that it must get: one of these codes, which names the field."""

    field: str
    value: Any
    codes: tuple[str, ...] = ("invalid_argument",)


MISTAKES = (
    Mistake("temperature", -1.0),
    Mistake("max_tokens", 100_000),
    Mistake("on_expert_loss", "maybe"),
    Mistake("model", "nobody", ("not_found", "model_not_found")),
    Mistake("key", "em-nobody", ("unauthenticated",)),
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``machines`` are asked in this order, the next one only to resume."""

    number: int
    kind: Kind
    machines: tuple[int, ...]
    is_http: bool
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    n: int
    logprobs: int | None
    ignore_eos: bool
    on_expert_loss: str
    timeout_s: float
    leaves_after: int = 0
    """How many tokens of all choices it waits for before it leaves; 0 where it stays."""
    mistake: Mistake | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes in pieces."""
        is_stream = self.kind in (Kind.STREAM, Kind.RESUME, Kind.DOUBT)
        return is_stream or (self.kind is Kind.HASTY and self.seed % 2 == 0)

    def value(self, name: str) -> Any:
        """Return a field as it is sent, wrong where this request is."""
        if self.mistake is not None and self.mistake.field == name:
            return self.mistake.value
        return MODEL if name == "model" else getattr(self, name)


def prompts_of(seed: int) -> list[tuple[int, ...]]:
    """Return the prompts of a run, some of which begin alike, as chats do."""
    source = random.Random(f"{seed}: prompts")
    shared = source.choices(VOCAB, k=SHARED_TOKENS)
    return [
        (*(shared if number % 2 else ()), *source.choices(VOCAB, k=source.randint(2, 40)))
        for number in range(PROMPTS)
    ]


def draw(seed: int, number: int) -> Ask:
    """Return request ``number`` of a run."""
    source = random.Random(f"{seed}: request {number}")
    kind = source.choices(list(Kind), (5, 5, 3, 1, 2, 2))[0]
    resumes = kind in (Kind.RESUME, Kind.DOUBT)
    n = source.choice((1, 1, 1, 2, 3))
    max_tokens = source.randint(8, 96)
    losses = ("strict", "strict", "next_expert", "drop")
    return Ask(
        number=number,
        kind=kind,
        machines=tuple(source.sample(MACHINES, len(MACHINES))),
        is_http=not resumes and source.random() < 0.5,
        prompt=source.choice(prompts_of(seed)),
        max_tokens=max_tokens * (4 if kind is Kind.HASTY else 1),
        temperature=source.choice((0.0, 0.0, 0.7, 1.2)),
        seed=source.randrange(1000),
        n=n,
        logprobs=source.choice((None, 0, 3)),
        ignore_eos=source.random() < 0.5,
        on_expert_loss="strict" if kind is Kind.DOUBT else source.choice(losses),
        timeout_s=source.uniform(*HASTY_S) if kind is Kind.HASTY else TIMEOUT_S,
        leaves_after=source.randint(1, n * max_tokens // 2) if resumes else 0,
        mistake=source.choice(MISTAKES) if kind is Kind.WRONG else None,
    )
