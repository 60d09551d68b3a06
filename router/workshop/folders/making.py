"""What every command from a served folder to a served folder does.

It calibrates, writes the new model beside the destination, scores both models on held-out text,
adds the card, and renames once. The same command resumes a run that was killed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.heap import give_back_freed
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.folder import language_model, open_folder
from experts.checkpoint.hub import name_of
from experts.checkpoint.stored import resolve_folder
from experts.convert.plan import Plan
from experts.convert.source import Source
from experts.convert.staging import job, publish, staged, write_whole
from experts.convert.write import write_model
from router.workshop.folders.card import CARD_FILE, RECORD_FILE, Figures, Record, card
from router.workshop.folders.layerwise import LayeredModel
from router.workshop.folders.passes import NewObserver, Pass, Seen
from router.workshop.folders.speed import speeds_of, with_active
from router.workshop.folders.text import Rows, Text

OnProgress = Callable[[str, int, int], None]
"""Receives a phase, and what of it is done, of how much."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A command: its name, and the options that decide the bytes."""

    command: str
    options: Mapping[str, Any]

    def words(self, source: str, dest: str, texts: Iterable[str]) -> list[str]:
        """Return the command line, with names in place of paths."""
        words = ["expertmesh", self.command, source, dest]
        for name, value in self.options.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif value is not None and value is not False:
                unit = "B" if name == "max_shard_size" else ""
                words += [option, f"{value}{unit}"]
        return words + [word for text in texts for word in ("--text", text)]


@dataclass(frozen=True, slots=True)
class Origin:
    """The source as the card names it: its name, its ``model_type`` and its weights' bytes."""

    name: str
    family: str
    num_bytes: int


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Return a served folder as the card names it."""
    family = checkpoint.family.model_type
    return Origin(name_of(checkpoint.folder), family, checkpoint.num_bytes)


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model to write.

    ``before`` is the source as a checkpoint, which is scored. ``score`` returns the nats of
    held-out rows of the written folder; it may use the folder of its third argument. ``curve`` are
    further numbers of experts of a token with which the written folder is scored; with
    ``with_speed`` it is timed with each. ``lines`` and ``facts`` are for the card and the record.
    """

    before: Checkpoint
    plan: Plan
    score: Callable[[Path, Rows, Path, OnProgress], float]
    check: Callable[[Path], object]
    lines: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[int, ...] = ()
    with_speed: bool = False


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


def make_folder(
    origin: Origin,
    source: Source,
    dest: Path,
    recipe: Recipe,
    text: Text | None,
    decide: Callable[[Path], NewModel],
    on_progress: OnProgress,
) -> Record:
    """Write the model that ``decide`` returns, with its card, to the folder ``dest``.

    ``source`` has the files that must not change meanwhile. ``decide`` gets a folder for its
    calibration. ``dest`` is new or empty (:func:`experts.convert.staging.check_dest`); it appears
    at the end. Raises :class:`experts.convert.staging.ConvertFailedError` for a disk that is full
    or not writable, and :class:`CheckpointError` for a source that changes meanwhile.
    """
    options = {"command": recipe.command, **recipe.options}
    begun = job(source, options | {"text": None if text is None else text.sha256})
    with staged(dest, begun) as folder:
        work = folder.parent / "work"
        made = decide(work / "calibration")
        write_model(
            made.plan, folder, lambda done, total: on_progress("writing", done >> 20, total >> 20)
        )
        give_back_freed()  # what the writing left in the heap
        figures = None
        if text is not None:
            figures = _figures(made, folder, text.heldout, work, on_progress)
        record = _record(origin, dest, recipe, text, made, figures)
        write_whole(folder / RECORD_FILE, record.to_json().encode())
        write_whole(folder / CARD_FILE, card(record).encode())
        made.check(folder)
        again = job(source, options | {"text": None if text is None else text.sha256})
        if again != begun:
            raise CheckpointError("has changed meanwhile; run the command again", str(source.path))
        publish(folder.parent, dest.absolute())
    return record


def _figures(
    made: NewModel,
    folder: Path,
    rows: Rows,
    work: Path,
    on_progress: OnProgress,
) -> Figures:
    before = nats_of(made.before, rows, work / "before", "scoring the source", on_progress)
    shutil.rmtree(work / "after", ignore_errors=True)  # it may be of a shard written again
    after = made.score(folder, rows, work / "after", on_progress)
    num_tokens = rows.targets.numel()
    curve = {}
    for active in made.curve:
        shutil.rmtree(work / f"active-{active}", ignore_errors=True)
        checkpoint = with_active(open_checkpoint(folder), active)
        nats = nats_of(
            checkpoint,
            rows,
            work / f"active-{active}",
            f"scoring it with {active} experts",
            on_progress,
        )
        curve[active] = math.exp(nats / num_tokens)
    return Figures(
        heldout_tokens=num_tokens,
        sequence_length=rows.targets.shape[1],
        perplexity_before=math.exp(before / num_tokens),
        perplexity_after=math.exp(after / num_tokens),
        perplexity_by_active=curve,
        speeds=speeds_of(folder, made.curve, on_progress) if made.with_speed else None,
    )


def _record(
    origin: Origin,
    dest: Path,
    recipe: Recipe,
    text: Text | None,
    made: NewModel,
    figures: Figures | None,
) -> Record:
    text_sha256 = {} if text is None else text.sha256
    return Record(
        name=dest.absolute().name,
        command=recipe.command,
        words=recipe.words(origin.name, dest.absolute().name, text_sha256),
        options=json.loads(json.dumps(dict(recipe.options))),
        source=origin.name,
        family=origin.family,
        source_bytes=origin.num_bytes,
        size_bytes=made.plan.size_bytes,
        text_sha256=text_sha256,
        figures=figures,
        lines=list(made.lines),
        facts=json.loads(json.dumps(dict(made.facts))),
    )
