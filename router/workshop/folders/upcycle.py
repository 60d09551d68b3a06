"""Upcycling: a dense model as a mixture, by copies of its feed-forward layers or by their parts.

Copies (Komatsuzaki et al. 2022, arXiv 2212.05055) are a start for training: any choice of experts
gives the dense model. Parts (CMoE, arXiv 2502.04416) need no training: with all of them chosen the
model is the dense one, and with fewer it is cheaper and worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.convert.plan import STORED, Plan, make_plan
from experts.convert.staging import check_dest
from experts.convert.write import write_model
from experts.families.base import Config
from router.workshop.folders.as_mixture import (
    Sizes,
    mixtral_config,
    one_expert,
    qwen2_moe_config,
)
from router.workshop.folders.card import Record
from router.workshop.folders.dense_model import DenseModel
from router.workshop.folders.layerwise import LayeredModel
from router.workshop.folders.making import (
    NewModel,
    OnProgress,
    Origin,
    Recipe,
    make_folder,
    score_served,
    seen_on,
)
from router.workshop.folders.split_fit import SplitObserver, layer_split
from router.workshop.folders.text import Rows, Text, read_text
from router.workshop.folders.twin_pass import Missed, TwinPass
from router.workshop.folders.upcycled import Copies, NewParts, Split, upcycled_source

By = Literal["split", "copies"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_COPIES_ACTIVE = 2
_CURVE_SHARES = (0.75, 0.5, 0.25, 0.125)
"""The shares of the experts with which a split model is scored too."""


@dataclass(frozen=True, slots=True)
class UpcycleOptions:
    """What decides an upcycled model.

    A layer has ``experts``, and a token ``active`` of them: by default all parts, and two copies.
    ``shared`` counts for parts: the shared expert is as large as so many of them. ``seed`` counts
    for copies: it is that of the random gate. With ``speed`` the card has tokens per second, which
    differ from run to run; all else decides the bytes.
    """

    experts: int
    by: By = "split"
    shared: int = 1
    active: int | None = None
    seed: int = 0
    dtype: Dtype = "auto"
    sequences: int = 64
    sequence_length: int = 256
    max_shard_size: int = 5_000_000_000
    speed: bool = False

    @property
    def num_active(self) -> int:
        """The experts of a token."""
        if self.active is not None:
            return self.active
        return self.experts if self.by == "split" else min(_COPIES_ACTIVE, self.experts)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked command: its plan, which has sizes alone, its text, and the dense model's plan.

    ``dense`` writes the model as a mixture of one expert a layer.
    """

    plan: Plan
    dense: Plan
    text: Text | None


def prepare_upcycle(
    model: DenseModel, dest: Path, options: UpcycleOptions, texts: Sequence[Path]
) -> Prepared:
    """Check everything before the first step.

    Raises ``ConfigError`` for a wrong ``dest``, for numbers of experts that cannot be and for a
    missing text, :class:`CheckpointError` for a dense model that cannot be a mixture, and as
    :func:`router.workshop.folders.text.read_text` does.
    """
    check_dest(dest)
    _check_counts(model, options)
    if options.by == "split" and not texts:
        raise ConfigError("--by split needs a calibration text", "--text")
    if options.speed and not texts:
        raise ConfigError("--speed is beside perplexities, which need a text", "--text")
    config = _config(model, options)
    dense = make_plan(one_expert(model.source, config), options.dtype, options.max_shard_size)
    config["dtype"] = dense.dtype
    parts: NewParts = Copies(options.seed)
    source = upcycled_source(config, model.source.config_file, dense.dtype, parts, None)
    plan = make_plan(source, STORED, options.max_shard_size)
    rows = options.sequences, options.sequence_length
    return Prepared(plan, dense, read_text(model, texts, *rows) if texts else None)


def _check_counts(model: DenseModel, options: UpcycleOptions) -> None:
    if options.experts < 2:
        raise ConfigError(f"must be at least 2 (given: {options.experts})", "--experts")
    if not 1 <= options.num_active <= options.experts:
        raise ConfigError(
            f"must be from 1 to the {options.experts} experts of a layer (given: {options.active})",
            "--active",
        )
    if options.by == "copies":
        return
    if options.shared < 1:
        raise ConfigError(
            f"must be at least 1, since Qwen2-MoE has a shared expert (given: {options.shared})",
            "--shared",
        )
    neurons, parts = _neurons(model), options.experts + options.shared
    if neurons % parts:
        raise ConfigError(
            f"{options.experts} experts and {options.shared} shared parts do not divide the "
            f"{neurons} neurons of a layer",
            "--experts",
        )


def _neurons(model: DenseModel) -> int:
    neurons = model.config.get("intermediate_size")
    if type(neurons) is not int or neurons < 1:
        raise CheckpointError("lacks a positive intermediate_size", str(model.source.config_file))
    return neurons


def _sizes(model: DenseModel, options: UpcycleOptions) -> Sizes:
    neurons = _neurons(model)
    if options.by == "copies":
        return Sizes(options.experts, options.num_active, neurons, 1)
    part = neurons // (options.experts + options.shared)
    return Sizes(options.experts, options.num_active, part, options.shared * part)


def _config(model: DenseModel, options: UpcycleOptions) -> Config:
    """Return the mixture's ``config.json``: copies of a model without biases are Mixtral's."""
    sizes = _sizes(model, options)
    if options.by == "copies" and model.family != "qwen2":
        return mixtral_config(model.source, sizes.experts, sizes.active)
    return qwen2_moe_config(model.source, sizes, renormalises=options.by == "copies")


def upcycle(
    model: DenseModel,
    dest: Path,
    options: UpcycleOptions,
    texts: Sequence[Path],
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Record:
    """Write the dense model as a mixture to the folder ``dest``; returns its record.

    The dense model is written twice: as a mixture of one expert a layer beside ``dest``, which is
    read for everything else, and as the result. Raises as :func:`prepare_upcycle` and
    :func:`router.workshop.folders.making.make_folder` do.
    """
    prepared = prepare_upcycle(model, dest, options, texts)

    def decide(work: Path) -> NewModel:
        dense = _written(prepared.dense, work.parent / "dense", on_progress)
        parts: NewParts = Copies(options.seed)
        if options.by == "split" and prepared.text is not None:
            sizes = _sizes(model, options)
            parts = _split(dense, prepared.text.calibration, sizes, work, on_progress)
        source = upcycled_source(
            prepared.plan.config, dense.folder / "config.json", dense.dtype, parts, dense
        )
        made = make_plan(source, STORED, options.max_shard_size)
        line, curve = _line(model, options), _curve(options)
        return NewModel(
            dense,
            made,
            score_served,
            open_checkpoint,
            (line,),
            curve=curve,
            with_speed=options.speed,
        )

    origin = Origin(model.name, model.family, model.num_bytes)
    decisive = {name: value for name, value in asdict(options).items() if name != "speed"}
    recipe = Recipe("upcycle", decisive)
    return make_folder(origin, model.source, dest, recipe, prepared.text, decide, on_progress)


def _written(plan: Plan, folder: Path, on_progress: OnProgress) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(plan, folder, lambda done, total: on_progress("reading", done >> 20, total >> 20))
    return open_checkpoint(folder)


def _split(
    dense: Checkpoint, rows: Rows, sizes: Sizes, work: Path, on_progress: OnProgress
) -> Split:
    """Return the parts of all layers, fitted to ``rows``; ``work`` keeps the passes."""

    def new_observer(layer_id: int, missed: Missed | None = None) -> SplitObserver:
        return SplitObserver(dense, layer_id, sizes, missed)

    if sizes.active == sizes.experts:
        seen = seen_on(dense, rows, work, new_observer, on_progress)
    else:
        twin = TwinPass(LayeredModel(dense), rows, work)
        seen = twin.run(new_observer, lambda *done: on_progress("calibrating", *done))
    return Split({layer_id: layer_split(found, sizes) for layer_id, found in seen.items()})


def _curve(options: UpcycleOptions) -> tuple[int, ...]:
    """Return the numbers of active experts to score further: those of an exact split."""
    if options.by == "copies" or options.num_active < options.experts:
        return ()
    counts = {round(share * options.experts) for share in _CURVE_SHARES}
    return tuple(sorted(counts - {0, options.experts}, reverse=True))


def _line(model: DenseModel, options: UpcycleOptions) -> str:
    if options.by == "copies":
        return (
            f"Each layer has {options.experts} copies of the dense one, and any "
            f"{options.num_active} of them give the dense model."
        )
    sizes = _sizes(model, options)
    of_token = sizes.shared_neurons + sizes.active * sizes.expert_neurons
    line = (
        f"Each layer's {_neurons(model):,} neurons are a shared expert of "
        f"{sizes.shared_neurons:,} and {sizes.experts} experts of {sizes.expert_neurons:,}. "
    )
    if sizes.active == sizes.experts:
        return line + "With all experts chosen the model is the dense one."
    return line + (
        f"A token has {sizes.active} of them, so {of_token / _neurons(model):.0%} of the neurons, "
        "and the last matrices are fitted for so many."
    )
