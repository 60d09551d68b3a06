"""Upcycling: a dense model as a mixture, by copies of its feed-forward layers or by their parts.

Copies (Komatsuzaki et al. 2022, arXiv 2212.05055) are a start for training: any choice of experts
gives the dense model. Parts (CMoE, arXiv 2502.04416) need no training: with all of them chosen the
model is the dense one, and with fewer it is cheaper and worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cluster.errors import CheckpointError, ConfigError
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.families.base import Config
from router.observability.progress import OnProgress
from workshop.convert.plan import STORED, Plan, make_plan
from workshop.convert.write import write_model
from workshop.folders.as_mixture import (
    Sizes,
    mixtral_config,
    one_expert,
    qwen2_moe_config,
)
from workshop.folders.dense_model import DenseModel
from workshop.folders.layerwise import LayeredModel
from workshop.folders.making import Command, NewModel, Rows, Text, seen_on
from workshop.folders.options import UpcycleOptions
from workshop.folders.passes import Missed, twin_run
from workshop.folders.rewritten import NewTensors, rewritten_source, source_of
from workshop.folders.upcycle.split_fit import SplitObserver, layer_split
from workshop.folders.upcycle.upcycled import Copies, Split

_CURVE_SHARES = (0.75, 0.5, 0.25, 0.125)
"""The shares of the experts with which a split model is scored too."""


@dataclass(frozen=True)
class Upcycle(Command):
    """The command that writes a dense model as a mixture.

    The dense model is written twice: as a mixture of one expert a layer beside the destination,
    which is read for everything else, and as the result.
    """

    name = "upcycle"
    model: DenseModel
    options: UpcycleOptions

    def plan(self, has_text: bool) -> Plan:
        """See :class:`Command`: for numbers of experts that cannot be, and for a missing text."""
        self._check_counts()
        if self.options.by == "split" and not has_text:
            raise ConfigError("--by split needs a calibration text", "--text")
        if self.options.speed and not has_text:
            raise ConfigError("--speed is beside perplexities, which need a text", "--text")
        origin, dtype = self.model.source, self._dense.dtype
        source = source_of(self._config, origin.config_file, origin.files, lambda name: dtype, None)
        return make_plan(source, STORED, self.options.max_shard_size)

    def decide(self, text: Text | None, work: Path, on_progress: OnProgress) -> NewModel:
        """See :class:`Command`."""
        options, folder = self.options, work.parent / "dense"
        folder.mkdir(parents=True, exist_ok=True)
        write_model(
            self._dense, folder, lambda done, total: on_progress("reading", done >> 20, total >> 20)
        )
        dense = open_checkpoint(folder)
        new: NewTensors = Copies(dense, options.experts, options.seed)
        if options.by == "split" and text is not None:
            new = _split(dense, text.calibration, self._sizes, work, on_progress)
        source = rewritten_source(dense, self._config, new)
        plan = make_plan(source, STORED, options.max_shard_size)
        curve = self._curve()
        return NewModel(dense, plan, self._line(), curve=curve, with_speed=options.speed)

    @cached_property
    def _config(self) -> Config:
        """The mixture's ``config.json``: copies of a model without biases are Mixtral's."""
        sizes, is_copies = self._sizes, self.options.by == "copies"
        if is_copies and self.model.family != "qwen2":
            return mixtral_config(self.model.source, sizes.experts, sizes.active)
        return qwen2_moe_config(self.model.source, sizes, renormalises=is_copies)

    @cached_property
    def _dense(self) -> Plan:
        """The plan of the mixture of one expert a layer."""
        source = one_expert(self.model.source, self._config)
        return make_plan(source, self.options.dtype, self.options.max_shard_size)

    @cached_property
    def _neurons(self) -> int:
        neurons, file = self.model.config.get("intermediate_size"), self.model.source.config_file
        if type(neurons) is not int or neurons < 1:
            raise CheckpointError("lacks a positive intermediate_size", str(file))
        return neurons

    @cached_property
    def _sizes(self) -> Sizes:
        options = self.options
        if options.by == "copies":
            return Sizes(options.experts, options.num_active, self._neurons, 1)
        part = self._neurons // (options.experts + options.shared)
        return Sizes(options.experts, options.num_active, part, options.shared * part)

    def _check_counts(self) -> None:
        options = self.options
        if options.experts < 2:
            raise ConfigError(f"must be at least 2 (given: {options.experts})", "--experts")
        if not 1 <= options.num_active <= options.experts:
            raise ConfigError(
                f"must be from 1 to the {options.experts} experts of a layer "
                f"(given: {options.active})",
                "--active",
            )
        if options.by == "copies":
            return
        if options.shared < 1:
            raise ConfigError(
                "must be at least 1, since Qwen2-MoE has a shared expert "
                f"(given: {options.shared})",
                "--shared",
            )
        if self._neurons % (options.experts + options.shared):
            raise ConfigError(
                f"{options.experts} experts and {options.shared} shared parts do not divide the "
                f"{self._neurons} neurons of a layer",
                "--experts",
            )

    def _curve(self) -> tuple[int, ...]:
        """Return the numbers of active experts to score further: those of an exact split."""
        options = self.options
        if options.by == "copies" or options.num_active < options.experts:
            return ()
        counts = {round(share * options.experts) for share in _CURVE_SHARES}
        return tuple(sorted(counts - {0, options.experts}, reverse=True))

    def _line(self) -> str:
        options, sizes = self.options, self._sizes
        if options.by == "copies":
            return (
                f"Each layer has {options.experts} copies of the dense one, and any "
                f"{options.num_active} of them give the dense model."
            )
        line = (
            f"Each layer's {self._neurons:,} neurons are a shared expert of "
            f"{sizes.shared_neurons:,} and {sizes.experts} experts of {sizes.expert_neurons:,}. "
        )
        if sizes.active == sizes.experts:
            return line + "With all experts chosen the model is the dense one."
        of_token = sizes.shared_neurons + sizes.active * sizes.expert_neurons
        return line + (
            f"A token has {sizes.active} of them, so {of_token / self._neurons:.0%} of the "
            "neurons, and the last matrices are fitted for that number."
        )


def _split(
    dense: Checkpoint, rows: Rows, sizes: Sizes, work: Path, on_progress: OnProgress
) -> Split:
    """Return the parts of all layers, fitted to ``rows``; ``work`` keeps the passes."""

    def new_observer(layer_id: int, missed: Missed | None = None) -> SplitObserver:
        return SplitObserver(dense, layer_id, sizes, missed)

    if sizes.active == sizes.experts:
        seen = seen_on(dense, rows, work, new_observer, on_progress)
    else:
        seen = twin_run(
            LayeredModel(dense),
            rows.inputs,
            work,
            new_observer,
            lambda *done: on_progress("calibrating", *done),
        )
    return Split(dense, {layer_id: layer_split(found, sizes) for layer_id, found in seen.items()})
