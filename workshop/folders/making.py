"""What every command that makes a folder of a model does.

It calibrates, writes the new model beside the destination, scores both models on held-out text,
adds the card, and renames once. The same command resumes a run that was killed.
"""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cluster.heap import give_back_freed
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.folder import language_model, open_folder
from experts.checkpoint.hub import name_of
from experts.checkpoint.stored import resolve_folder
from router.observability.progress import OnProgress
from workshop.convert.plan import Plan
from workshop.convert.staging import check_dest, staged, write_whole
from workshop.convert.write import write_model
from workshop.folders.card import CARD_FILE, RECORD_FILE, Figures, Record, card
from workshop.folders.dense_model import DenseModel
from workshop.folders.layerwise import LayeredModel
from workshop.folders.options import MakeOptions
from workshop.folders.passes import NewObserver, Pass, Seen
from workshop.folders.speed import speeds_of, with_active
from workshop.folders.text import Rows, Text, read_text


@dataclass(frozen=True, slots=True)
class Origin:
    """The source as the card names it: its name, its ``model_type`` and its weights' bytes."""

    name: str
    family: str
    num_bytes: int


def origin_of(model: Checkpoint | DenseModel) -> Origin:
    """Return a source as the card names it."""
    if isinstance(model, DenseModel):
        return Origin(model.name, model.family, model.num_bytes)
    return Origin(name_of(model.folder), model.family.model_type, model.num_bytes)


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


def score_served(folder: Path, rows: Rows, work: Path, on_progress: OnProgress) -> float:
    """Return the nats of a served folder; see :class:`NewModel`."""
    return nats_of(open_checkpoint(folder), rows, work, "scoring the new model", on_progress)


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model to write.

    ``before`` is the source as a checkpoint, which is scored. ``line`` and ``facts`` are for the
    card and the record. ``score`` returns the nats of held-out rows of the written folder; it may
    use the folder of its third argument. ``check`` raises for a folder that is not whole. ``curve``
    are further numbers of experts of a token with which the written folder is scored; with
    ``with_speed`` it is timed with each.
    """

    before: Checkpoint
    plan: Plan
    line: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[Path, Rows, Path, OnProgress], float] = score_served
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
    :meth:`Command.plan` and :func:`workshop.folders.text.read_text` do.
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
            words=_words(command.name, origin.name, name, options, text_sha256),
            options=options,
            source=origin.name,
            family=origin.family,
            source_bytes=origin.num_bytes,
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
    after = made.score(folder, rows, work / "after", on_progress)
    curve = {}
    for active in made.curve:
        place, phase = work / f"active-{active}", f"scoring it with {active} experts"
        shutil.rmtree(place, ignore_errors=True)
        checkpoint = with_active(open_checkpoint(folder), active)
        nats = nats_of(checkpoint, rows, place, phase, on_progress)
        curve[active] = math.exp(nats / num_tokens)
    return Figures(
        heldout_tokens=num_tokens,
        sequence_length=rows.targets.shape[1],
        perplexity_before=math.exp(before / num_tokens),
        perplexity_after=math.exp(after / num_tokens),
        perplexity_by_active=curve,
        speeds=speeds_of(folder, made.curve, on_progress) if made.with_speed else None,
    )
