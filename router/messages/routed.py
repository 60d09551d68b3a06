"""The experts of each token, which a request may ask for and may force.

A row has the experts of one token: ids [L, K] in the order of the MoE layers and, in each, of the
gate's choice, best first in most families. Rows are packed as little-endian numbers, one after the
other.

Dimension letters: L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_SMALL = 255
"""Ids of so many experts at most fit one byte; the largest number of the dtype is no id."""
LITTLE_ENDIAN = {"uint8": "<u1", "uint16": "<u2"}
"""numpy's names of the packed dtypes."""


def dtype_of(num_experts: int) -> str:
    """Return the name of the dtype of the ids of a layer with so many experts."""
    return "uint8" if num_experts <= MAX_SMALL else "uint16"


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """What a request asks of its tokens' experts; ``gateway/input/routed.py`` has checked it.

    ``shape`` is (L, K); a layer has ``num_experts``. With ``returned``, rows come with the tokens.
    ``forced`` are packed rows for the request's first tokens, which go to these experts.
    """

    shape: tuple[int, int]
    num_experts: int
    returned: bool = False
    forced: bytes = b""

    @property
    def dtype(self) -> str:
        """The dtype of its rows."""
        return dtype_of(self.num_experts)

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        num_layers, top_k = self.shape
        return num_layers * top_k * (1 if self.dtype == "uint8" else 2)

    def to_wire(self) -> list[Any]:
        """Return it as a msgpack-able list."""
        return [self.shape, self.num_experts, self.returned, self.forced]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> RoutedExperts:
        """Rebuild it from :meth:`to_wire`."""
        shape, num_experts, returned, forced = wire
        return cls(tuple(shape), num_experts, returned, forced)


def rows_after(rows: bytes, start: int, passed_on: int, row_bytes: int) -> bytes | None:
    """Return the rows that were not passed on; ``None`` where rows before them are missing.

    ``rows`` begin with row ``start``; ``passed_on`` counts those that were passed on.
    """
    skip = passed_on - start
    return None if skip < 0 else rows[skip * row_bytes :]
