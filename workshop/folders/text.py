"""Texts as rows of tokens of a model: for calibration, and held out.

Dimension letters: N rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint
from router.gateway.input.tokenizer import Tokenizer
from workshop.folders.dense_model import DenseModel
from workshop.texts import Sequences, read_corpus

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
    model: Checkpoint | DenseModel, paths: Sequence[Path], num_rows: int, row_tokens: int
) -> Text:
    """Return at most ``num_rows`` rows of each kind, spread evenly over the texts.

    Raises ``ConfigError`` for a text that cannot be read, is shorter than a row, or too short to
    hold any of it out, and for a tokenizer that does not fit the model, and
    :class:`CheckpointError` for a model without one.
    """
    longest = model.max_position_embeddings
    if not 1 <= row_tokens <= longest:
        raise ConfigError(f"must be from 1 to {longest} (given: {row_tokens})", "--sequence-length")
    if num_rows < 1:
        raise ConfigError(f"must be at least 1 (given: {num_rows})", "--sequences")
    corpus = read_corpus(paths, HOLDOUT_EVERY_BLOCKS)
    if not any((*model.folder.glob("tokenizer.json"), *model.folder.glob("*.model"))):
        raise CheckpointError("has no tokenizer, so no text can be read", str(model.folder))
    tokenizer = Tokenizer.load(str(model.folder))
    sequences = Sequences(tokenizer, model.vocab_size, row_tokens + 1)

    def rows(documents: Iterable[str], where: str) -> Rows:
        return _rows(sequences.cut(_ids(model, tokenizer, documents), where), num_rows)

    heldout = (part for parts in corpus.heldout_documents.values() for part in parts)
    calibration = rows(corpus.train_documents, "--text")
    return Text(calibration, rows(heldout, "--text, held-out part"), corpus.files)


def _rows(sequences: Iterable[Sequence[int]], num_rows: int) -> Rows:
    """Return at most so many of the sequences, evenly spread."""
    found = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    places = torch.linspace(0, len(found) - 1, min(num_rows, len(found))).round().long()
    rows = torch.stack([found[place] for place in places.tolist()])
    return Rows(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def _ids(
    model: Checkpoint | DenseModel, tokenizer: Tokenizer, documents: Iterable[str]
) -> Iterator[list[int]]:
    """Yield the ids of each document, and an end-of-text token after them."""
    end = model.config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False)
        yield [*ids, end] if isinstance(end, int) else ids
