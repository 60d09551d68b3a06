"""Parts of the cards that the workshop writes, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, without a line feed at its end; integers get commas, floats two digits."""
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    texts = (_text(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return f"{cell:,}" if type(cell) is int else str(cell)


def hashes(text_sha256: Mapping[str, str]) -> str:
    """Return a list of texts with their hashes, by file name."""
    return "\n".join(f"- `{name}`: sha256 `{sha}`" for name, sha in text_sha256.items())
