"""What came of a request, gathered piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tests.blackbox.asks import Ask

REFUSED, BROKEN = "connection refused", "connection broken"
"""What a client sees where no server answers: from the first on, or no longer."""


class Failure(NamedTuple):
    """An error that a machine gave, or the lack of a connection, to one attempt."""

    machine: int
    began_s: float
    at_s: float
    code: str
    param: str
    message: str


class Piece(NamedTuple):
    """New tokens of a choice."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    exact: bool | None
    """``None`` where the answer does not say."""


@dataclass(slots=True)
class Choice:
    """One choice so far."""

    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str | None = None
    identities: set[str] = field(default_factory=set)
    doubted: int | None = None
    """How many pieces had come when the client first said that they were not exact."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens that have come."""
        return tuple(token for piece in self.pieces for token in piece.token_ids)

    @property
    def is_inexact(self) -> bool:
        """Whether any piece has said that it is not exact."""
        return any(piece.exact is False for piece in self.pieces)


@dataclass(slots=True)
class Answer:
    """All that came: choices, usage, and every failure; the last one ended it if ``has_failed``."""

    ask: Ask
    began_s: float
    ended_s: float = 0.0
    choices: list[Choice] = field(default_factory=list)
    usage: tuple[int, int, int] | None = None
    """Tokens of the prompt, of all choices, of both."""
    failures: list[Failure] = field(default_factory=list)
    has_failed: bool = False

    @property
    def num_tokens(self) -> int:
        """The tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)
