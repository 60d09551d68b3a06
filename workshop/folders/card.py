"""The card of a folder that a command made from another one, and its record as JSON."""

from __future__ import annotations

import json
import shlex
from typing import Any

from pydantic import BaseModel

from workshop.tables import hashes, table

CARD_FILE = "README.md"
RECORD_FILE = "workshop.json"


class Speeds(BaseModel):
    """Tokens per second of one stream on a processor, like ``perplexity_by_active`` too."""

    processor: str
    threads: int
    tokens_per_s: float
    tokens_per_s_by_active: dict[int, float]


class Figures(BaseModel):
    """The perplexities per token of the same held-out tokens, before and after.

    ``perplexity_by_active`` has those of the new model with other numbers of experts of a token.
    """

    heldout_tokens: int
    sequence_length: int
    perplexity_before: float
    perplexity_after: float
    perplexity_by_active: dict[int, float] = {}
    speeds: Speeds | None = None


class Record(BaseModel):
    """The content of workshop.json: the command, its options, and what came of it.

    ``options`` decide the bytes. ``lines`` are sentences for the card, and ``facts`` what was
    decided in each layer. ``figures`` is ``None`` without a text.
    """

    name: str
    command: str
    words: list[str]
    options: dict[str, Any]
    source: str
    family: str
    source_bytes: int
    size_bytes: int
    text_sha256: dict[str, str]
    figures: Figures | None
    lines: list[str]
    facts: dict[str, Any]

    def to_json(self) -> str:
        """Return the text of workshop.json."""
        return json.dumps(self.model_dump(), indent=2) + "\n"


def card(record: Record) -> str:
    """Return the text of README.md."""
    recipe = [
        *((name.replace("_", " "), "none" if value is None else str(value))
          for name, value in record.options.items()),
        ("bytes of the source", record.source_bytes),
        ("bytes", record.size_bytes),
    ]  # fmt: skip
    lines = "\n".join(record.lines)
    return f"""# {record.name}

Made of `{record.source}` ({record.family}) by `expertmesh {record.command}`. {lines}

```sh
{shlex.join(record.words)}
```

{table(("Recipe", ""), recipe)}

{_text(record)}"""


def _text(record: Record) -> str:
    if record.figures is None:
        return "No text was given, so nothing was measured.\n"
    return f"""{_perplexities(record.figures)}

Calibration and held-out text are of the same files:

{hashes(record.text_sha256)}
"""


def _perplexities(figures: Figures) -> str:
    """Return the table of perplexities, and of speeds where they were measured."""
    title = f"On {figures.heldout_tokens:,} held-out tokens, in sequences of "
    head = [title + str(figures.sequence_length), "Perplexity per token"]
    rows = [
        ["the source", f"{figures.perplexity_before:.3f}"],
        ["this model", f"{figures.perplexity_after:.3f}"],
    ]
    for active, perplexity in figures.perplexity_by_active.items():
        rows.append([f"this model with {active} experts of a token", f"{perplexity:.3f}"])
    if (speeds := figures.speeds) is not None:
        threads = "1 thread" if speeds.threads == 1 else f"{speeds.threads} threads"
        head.append(f"Tokens/s of one stream, {threads} of {speeds.processor}")
        measured = speeds.tokens_per_s, *speeds.tokens_per_s_by_active.values()
        for row, cell in zip(rows, ["", *(f"{speed:.1f}" for speed in measured)], strict=True):
            row.append(cell)
    return table(head, rows)
