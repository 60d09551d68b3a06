"""Bars in rows, so that none lie on each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A bar of some lane: from when to when, what it is called, and its color."""

    begun_s: float
    ended_s: float
    label: str
    color: str
    title: str = ""


def packed(
    pieces: Sequence[Piece], extent: Callable[[Piece], tuple[float, float]]
) -> list[list[Piece]]:
    """Put pieces into as few rows as their order allows, so that none lie on each other."""
    rows: list[tuple[float, list[Piece]]] = []
    for piece in sorted(pieces, key=lambda one: one.begun_s):
        left, right = extent(piece)
        for place, (end, row) in enumerate(rows):
            if end <= left:
                row.append(piece)
                rows[place] = right, row
                break
        else:
            rows.append((right, [piece]))
    return [row for _, row in rows]
