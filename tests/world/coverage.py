"""Which faults and operations have met in one world, as a table of text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

WIDTH = 6
"""Characters of a column; longer words of a heading are cut."""


class Coverage:
    """Counts the seeds in which a fault, an operation, or both hit."""

    def __init__(self, faults: Sequence[str], operations: Sequence[str]) -> None:
        self.faults = tuple(faults)
        self.operations = tuple(operations)
        self.seeds: Counter[str] = Counter()
        """The number of seeds in which a kind hit."""
        self.pairs: Counter[tuple[str, str]] = Counter()
        """The number of seeds in which a fault and an operation hit."""

    def add(self, hit: Iterable[str]) -> None:
        kinds = set(hit)
        self.seeds.update(kinds)
        self.pairs.update(
            (fault, operation)
            for fault in self.faults
            if fault in kinds
            for operation in self.operations
            if operation in kinds
        )

    def num_met(self) -> int:
        return sum(count > 0 for count in self.pairs.values())

    def num_pairs(self) -> int:
        return len(self.faults) * len(self.operations)

    def table(self) -> str:
        """Return the table: faults down, operations across, a dot for those that never met."""
        left = max(len(fault) for fault in self.faults)
        heads = [_cut(operation) for operation in ("seeds", *self.operations)]
        rows = [
            _row("", [words[-1 - line] if line < len(words) else "" for words in heads], left)
            for line in reversed(range(max(map(len, heads))))
        ]
        counts = [self.seeds[operation] for operation in self.operations]
        rows.append(_row("seeds", ["", *map(_number, counts)], left))
        for fault in self.faults:
            met = [self.pairs[fault, operation] for operation in self.operations]
            rows.append(_row(fault, map(_number, [self.seeds[fault], *met]), left))
        return "\n".join(rows)


def _cut(heading: str) -> list[str]:
    return [word[:WIDTH] for word in heading.split()]


def _number(count: int) -> str:
    return str(count) if count else "·"


def _row(first: str, cells: Iterable[str], left: int) -> str:
    return (first.ljust(left) + "".join(cell.rjust(WIDTH + 1) for cell in cells)).rstrip()
