"""Greedy generation over llama.cpp's interface of batches; the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.peers.side import Tokens

GGML_F32, GGML_F16 = 0, 1
"""Numbers of ggml's types."""


@dataclass(frozen=True, slots=True)
class Row:
    """A token in a batch; ``wants_next`` asks for the most likely token after it."""

    token: int
    position: int
    sequence: int
    wants_next: bool


class Context(Protocol):
    """A model and the keys and values of its sequences."""

    def clear(self) -> None:
        """Forget all sequences."""

    def step(self, rows: Sequence[Row]) -> list[int]:
        """Compute a batch; returns the next tokens of the rows that want one, in their order."""


def generate(context: Context, prompts: Sequence[Sequence[int]], tokens: int) -> Tokens:
    """Return ``tokens`` greedy tokens for each prompt, all sequences in one batch a step."""
    context.clear()
    rows = [
        Row(token, position, sequence, position == len(ids) - 1)
        for sequence, ids in enumerate(prompts)
        for position, token in enumerate(ids)
    ]
    generated: Tokens = [[] for _ in prompts]
    for number in range(tokens):
        following = context.step(rows)
        for ids, token in zip(generated, following, strict=True):
            ids.append(token)
        rows = [
            Row(token, len(prompts[sequence]) + number, sequence, True)
            for sequence, token in enumerate(following)
        ]
    return generated
