"""The arguments and results of both clients, and their own error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import UnavailableError
from router.messages.request import TokenLogprobs, Usage


class UnreachableError(UnavailableError):
    """No ExpertMesh server answers at the address."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice, or in a stream a new piece of one.

    ``finish_reason`` is ``stop``, ``length`` or, while the choice goes on, ``None``. ``exact`` is
    false when for its tokens, or any before them, an expert's share was replaced or dropped.
    ``usage`` is there on the first choice of :meth:`Client.generate` and a stream's last piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    exact: bool
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The numbers of a served model."""

    id: str
    family: str
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int
    max_model_len: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; ``None`` leaves a field to the server's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None
