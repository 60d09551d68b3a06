"""Texts as rows of tokens of a served model: for calibration, and held out.

Dimension letters: N rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint
from router.gateway.tokenizer import Tokenizer
from router.workshop.corpus import read_corpus

HOLDOUT_EVERY_BLOCKS = 5
"""Every fifth block of about 4,096 characters is held out."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Token ids [N, L], each row as a served prompt begins, and the next tokens [N, L]."""

    inputs: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class Text:
    """Rows for calibration and held-out rows of the same texts; ``sha256`` goes by file name."""

    calibration: Rows
    heldout: Rows
    sha256: dict[str, str]


def read_text(
    checkpoint: Checkpoint, paths: Sequence[Path], num_rows: int, row_tokens: int
) -> Text:
    """Return at most ``num_rows`` rows of each kind, spread evenly over the texts.

    Raises ``ConfigError`` for a text that cannot be read, is shorter than a row, or too short to
    hold any of it out, and :class:`CheckpointError` for a tokenizer that does not fit the model.
    """
    longest = checkpoint.max_position_embeddings
    if not 1 <= row_tokens <= longest:
        raise ConfigError(f"must be from 1 to {longest} (given: {row_tokens})", "--sequence-length")
    if num_rows < 1:
        raise ConfigError(f"must be at least 1 (given: {num_rows})", "--sequences")
    corpus = read_corpus(list(paths), HOLDOUT_EVERY_BLOCKS)
    if checkpoint.small_file("tokenizer.json") is None and not any(
        checkpoint.folder.glob("*.model")
    ):
        raise CheckpointError("has no tokenizer, so no text can be read", str(checkpoint.folder))
    tokenizer = Tokenizer.load(str(checkpoint.folder))
    heldout = [part for parts in corpus.heldout_documents.values() for part in parts]
    return Text(
        _rows(checkpoint, tokenizer, corpus.train_documents, num_rows, row_tokens, "text"),
        _rows(checkpoint, tokenizer, heldout, num_rows, row_tokens, "held-out text"),
        corpus.files,
    )


def _rows(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    num_rows: int,
    row_tokens: int,
    kind: str,
) -> Rows:
    start = tokenizer.encode("")[-1:]  # what a served prompt begins with
    tokens = _encoded(checkpoint, tokenizer, documents)
    window = row_tokens + 1 - len(start)
    found = len(tokens) // window
    if not found:
        raise ConfigError(
            f"the {kind} has {len(tokens)} tokens, fewer than a sequence of {row_tokens}; give "
            "more text or a smaller --sequence-length",
            "--text",
        )
    places = torch.linspace(0, found - 1, min(num_rows, found)).round().long() * window
    rows = tokens[places[:, None] + torch.arange(window)]
    first = torch.tensor(start, dtype=torch.int64).expand(len(rows), -1)
    rows = torch.cat((first, rows), dim=1)
    return Rows(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def _encoded(
    checkpoint: Checkpoint, tokenizer: Tokenizer, documents: Sequence[str]
) -> torch.Tensor:
    """Return the ids of all documents in a row; an end-of-text token follows each."""
    end = checkpoint.config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document, add_special_tokens=False)
        if isinstance(end, int):
            ids.append(end)
    highest = max(ids, default=0)
    if highest >= checkpoint.vocab_size:
        raise CheckpointError(
            f"the tokenizer does not fit: it gives the id {highest}, and the model has "
            f"{checkpoint.vocab_size} ids",
            str(checkpoint.folder),
        )
    return torch.tensor(ids, dtype=torch.int64)
