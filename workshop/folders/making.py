"""What every command that makes a folder of a model does.

It reads texts as rows of tokens, calibrates, writes the new model beside the destination, scores
both models on held-out text, adds the card, and renames once. The same command resumes a run that
was killed.

Dimension letters: N rows, L tokens of a row.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch

from cluster.errors import CheckpointError, ConfigError
from cluster.heap import give_back_freed
from cluster.processor import processor_name
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.folder import language_model, open_folder
from experts.checkpoint.hub import name_of
from experts.checkpoint.stored import resolve_folder
from experts.families.counts import with_counts
from router.gateway.input.tokenizer import Tokenizer
from router.observability.progress import OnProgress
from workshop.convert.plan import Plan
from workshop.convert.staging import check_dest, staged, write_whole
from workshop.convert.write import write_model
from workshop.folders.card import CARD_FILE, RECORD_FILE, Figures, Record, Speeds, card
from workshop.folders.dense_model import DenseModel
from workshop.folders.layerwise import LayeredModel
from workshop.folders.options import MakeOptions
from workshop.folders.passes import NewObserver, Pass, Seen
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


def origin_of(model: Checkpoint | DenseModel) -> dict[str, Any]:
    """Return a source's name, its ``model_type`` and its weights' bytes, as the record has them."""
    if isinstance(model, DenseModel):
        name, family = model.name, model.family
    else:
        name, family = name_of(model.folder), model.family.model_type
    return {"source": name, "family": family, "source_bytes": model.num_bytes}


def source_checkpoint(path: str) -> Checkpoint:
    """Open the folder of a command line: a path, a folder of the deploy package, or a hub id.

    Raises :class:`CheckpointError`.
    """
    folder = Path(path).absolute() if Path(path).is_dir() else resolve_folder(path)
    return language_model(open_folder(folder))


def seen_on(
    checkpoint: Checkpoint,
    rows: Rows,
    folder: Path,
    new_observer: NewObserver,
    on_progress: OnProgress,
) -> Seen:
    """Return what observers see on calibration rows; ``folder`` keeps the pass."""
    calibration = Pass(LayeredModel(checkpoint), rows.inputs, folder)
    return calibration.run(new_observer, lambda *done: on_progress("calibrating", *done))


def nats_of(
    checkpoint: Checkpoint, rows: Rows, folder: Path, phase: str, on_progress: OnProgress
) -> float:
    """Return the loss in nats of rows; ``folder`` keeps the pass."""
    heldout = Pass(LayeredModel(checkpoint), rows.inputs, folder)
    heldout.run(None, lambda *done: on_progress(phase, *done))
    return heldout.nats(rows.targets)


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model to write.

    ``before`` is the source as a checkpoint, which is scored. ``line`` and ``facts`` are for the
    card and the record. ``score`` returns the nats of held-out rows of the written folder, by
    default as it is served; it may use the folder of its third argument. ``check`` raises for a
    folder that is not whole. ``curve`` are further numbers of experts of a token with which the
    written folder is scored; with ``with_speed`` it is timed with each.
    """

    before: Checkpoint
    plan: Plan
    line: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[Path, Rows, Path, OnProgress], float] | None = None
    check: Callable[[Path], object] = open_checkpoint
    curve: tuple[int, ...] = ()
    with_speed: bool = False


class Command(ABC):
    """A command that makes a folder of ``model``, by ``options``."""

    name: ClassVar[str]
    model: Checkpoint | DenseModel
    options: MakeOptions

    @abstractmethod
    def plan(self, has_text: bool) -> Plan:
        """Check everything but the text; the plan has the sizes that any decision gives.

        Raises ``ConfigError``, whose field is the option, and :class:`CheckpointError` for a model
        that cannot become what is asked for.
        """

    @abstractmethod
    def decide(self, text: Text | None, work: Path, on_progress: OnProgress) -> NewModel:
        """Return the model to write; the folder ``work`` keeps the calibration."""


def prepare(command: Command, dest: Path, texts: Sequence[Path]) -> tuple[Plan, Text | None]:
    """Check everything before the first step; returns a plan of the same sizes, and the text.

    ``dest`` is new or empty. Raises as :func:`workshop.convert.staging.check_dest`,
    :meth:`Command.plan` and :func:`workshop.folders.making.read_text` do.
    """
    check_dest(dest)
    plan = command.plan(bool(texts))
    rows = command.options.sequences, command.options.sequence_length
    return plan, read_text(command.model, texts, *rows) if texts else None


def make_folder(
    command: Command,
    dest: Path,
    texts: Sequence[Path],
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Record:
    """Write what a command makes to the folder ``dest``, with its card; returns its record.

    ``dest`` appears at the end. Raises as :func:`prepare` and
    :func:`workshop.convert.staging.staged` do.
    """
    plan, text = prepare(command, dest, texts)
    options = command.options.recipe()
    text_sha256 = {} if text is None else text.sha256
    job = {"command": command.name, **options, "text": text_sha256}
    with staged(dest, plan.source, job) as folder:
        work = folder.parent / "work"
        made = command.decide(text, work / "calibration", on_progress)
        write_model(
            made.plan, folder, lambda done, total: on_progress("writing", done >> 20, total >> 20)
        )
        give_back_freed()  # what the writing left in the heap
        figures = None
        if text is not None:
            figures = _figures(made, folder, text.heldout, work, on_progress)
        origin, name = origin_of(command.model), dest.absolute().name
        record = Record(
            name=name,
            command=command.name,
            words=_words(command.name, origin["source"], name, options, text_sha256),
            options=options,
            **origin,
            size_bytes=made.plan.size_bytes,
            text_sha256=text_sha256,
            figures=figures,
            lines=[made.line],
            facts=json.loads(json.dumps(made.facts)),
        )
        write_whole(folder / RECORD_FILE, record.to_json().encode())
        write_whole(folder / CARD_FILE, card(record).encode())
        made.check(folder)
    return record


def _words(
    command: str, source: str, dest: str, options: Mapping[str, Any], texts: Iterable[str]
) -> list[str]:
    """Return the command line, with names in place of paths."""
    words = ["expertmesh", command, source, dest]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, f"{value}B" if name == "max_shard_size" else str(value)]
    return words + [word for text in texts for word in ("--text", text)]


def _figures(
    made: NewModel,
    folder: Path,
    rows: Rows,
    work: Path,
    on_progress: OnProgress,
) -> Figures:
    num_tokens = rows.targets.numel()
    before = nats_of(made.before, rows, work / "before", "scoring the source", on_progress)
    shutil.rmtree(work / "after", ignore_errors=True)  # it may be of a shard written again
    if made.score is not None:
        after = made.score(folder, rows, work / "after", on_progress)
    else:
        served = open_checkpoint(folder)
        after = nats_of(served, rows, work / "after", "scoring the new model", on_progress)
    speeds, curve = None, {}
    for active in made.curve:
        place, phase = work / f"active-{active}", f"scoring it with {active} experts"
        shutil.rmtree(place, ignore_errors=True)
        checkpoint = with_active(open_checkpoint(folder), active)
        nats = nats_of(checkpoint, rows, place, phase, on_progress)
        curve[active] = math.exp(nats / num_tokens)
    if made.with_speed:
        on_progress("timing", 0, 0)
        checkpoint = open_checkpoint(folder)
        speeds = Speeds(
            processor=processor_name(),
            threads=torch.get_num_threads(),
            tokens_per_s=tokens_per_s(checkpoint),
            tokens_per_s_by_active={
                active: tokens_per_s(with_active(checkpoint, active)) for active in made.curve
            },
        )
    return Figures(
        heldout_tokens=num_tokens,
        sequence_length=rows.targets.shape[1],
        perplexity_before=math.exp(before / num_tokens),
        perplexity_after=math.exp(after / num_tokens),
        perplexity_by_active=curve,
        speeds=speeds,
    )


TOKENS = 128
"""The tokens that are timed, fewer where the model's context is shorter."""


def with_active(checkpoint: Checkpoint, active: int) -> Checkpoint:
    """Return an opened checkpoint with another number of experts of a token."""
    shape = replace(checkpoint.shape, num_experts_per_tok=active)
    config = with_counts(checkpoint.family, checkpoint.config, shape.num_experts, active)
    return replace(checkpoint, config=config, shape=shape)


def tokens_per_s(checkpoint: Checkpoint) -> float:
    """Return the tokens per second of one stream: those of the median token.

    Attention, gates and experts are the served ones; what a network and other processes cost is
    not in it.
    """
    # Brings Ray and its 90 MB, which prune and merge have no use for.
    from workshop.evaluate.local_model import FolderModel

    length = min(1 + TOKENS, checkpoint.max_position_embeddings)
    model = FolderModel(checkpoint, length)
    _, at_s = model.greedy((0,), length - 1)
    return 1 / statistics.median(later - earlier for earlier, later in pairwise(at_s))
