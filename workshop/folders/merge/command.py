"""Merging: the experts of a layer into fewer, or into one.

Dimension letters: E experts of a layer, N of the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.errors import CheckpointError, ConfigError
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.config import read_json
from experts.checkpoint.shards import read_headers
from router.observability.progress import OnProgress
from workshop.convert.plan import STORED, Plan, make_plan
from workshop.folders.making import Command, NewModel, Text, seen_on
from workshop.folders.merge.dense import check_dense, dense_plan, score_dense
from workshop.folders.merge.likeness import (
    DOWN,
    DOWN_BIAS,
    LikenessObserver,
    assignment_bytes,
    grouped,
    in_order,
    neuron_orders,
)
from workshop.folders.options import MergeOptions
from workshop.folders.passes import Seen
from workshop.folders.rewritten import (
    NewTensors,
    check_count,
    gate_groups,
    new_config,
    rewritten_source,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that become one: their ids, and their shares of it, which sum to 1."""

    expert_ids: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def reference(self) -> int:
        """The expert with the largest share, to which the others are aligned."""
        return self.expert_ids[int(np.argmax(self.shares))]


@dataclass(frozen=True, slots=True)
class Merging:
    """The groups of each layer, and the factors of their outputs."""

    groups: Mapping[int, Sequence[Group]]
    factors: Mapping[int, float]


class MergedExperts(NewTensors):
    """The merged experts of a checkpoint.

    A merged expert is the mean of its group by shares, its neurons in the reference's order.
    """

    def __init__(self, checkpoint: Checkpoint, merging: Merging) -> None:
        super().__init__(checkpoint)
        self._merging = merging
        self._layer_id = -1
        self._orders: dict[int, torch.Tensor] = {}

    def gate_rows(self, layer_id: int, rows: np.ndarray) -> np.ndarray:
        """Return the mean row of each group, by shares."""
        found = from_array(rows)
        groups = self._merging.groups[layer_id]
        merged = np.empty((len(groups), *rows.shape[1:]), rows.dtype)
        for place, group in zip(from_array(merged), groups, strict=True):
            place.copy_(_mean(group, lambda expert_id: found[expert_id].float()))
        return merged

    def matrix(self, layer_id: int, expert_id: int, index: int) -> np.ndarray:
        """Return a part of a merged expert, in float32."""
        group = self._merging.groups[layer_id][expert_id]

        def part(member: int) -> torch.Tensor:
            stored = self._part(layer_id, member, index)
            if member != group.reference:
                stored = in_order(stored, index, self._order(layer_id, group, member))
            return stored.float()

        merged = _mean(group, part)
        factor = self._merging.factors[layer_id] if index in (DOWN, DOWN_BIAS) else 1.0
        found: np.ndarray = (merged if factor == 1.0 else merged.mul_(factor)).numpy()
        return found

    def _order(self, layer_id: int, group: Group, member: int) -> torch.Tensor:
        if layer_id != self._layer_id:
            self._layer_id, self._orders = layer_id, {}
        if member not in self._orders:
            self._orders |= self._orders_of(layer_id, group)
        return self._orders[member]

    def _orders_of(self, layer_id: int, group: Group) -> dict[int, torch.Tensor]:
        """Return the orders of all members but the reference that have a share."""
        checkpoint, shape = self.checkpoint, self.checkpoint.shape
        members = [
            expert_id
            for expert_id, share in zip(group.expert_ids, group.shares, strict=True)
            if expert_id != group.reference and share > 0
        ]
        layer_bytes = shape.num_experts * checkpoint.expert_bytes(checkpoint.dtype)
        fitting = layer_bytes // assignment_bytes(shape.intermediate_size)
        at_once = max(1, min(torch.get_num_threads(), fitting))
        experts = (self._parts(layer_id, member) for member in members)
        try:
            orders = neuron_orders(self._parts(layer_id, group.reference), experts, at_once)
        except ValueError:
            message = f"an expert of layer {layer_id} has numbers that are not finite"
            raise CheckpointError(message, str(checkpoint.folder)) from None
        return dict(zip(members, orders, strict=True))

    def _parts(self, layer_id: int, expert_id: int) -> list[torch.Tensor]:
        config = self.checkpoint.config
        tensors = self.checkpoint.family.expert_tensors(config, layer_id, expert_id)
        return [self._part(layer_id, expert_id, index) for index in range(len(tensors.parts()))]

    def _part(self, layer_id: int, expert_id: int, index: int) -> torch.Tensor:
        """Return a part of an expert in its own dtype, or in float32 where it is quantised."""
        return from_array(self.part(layer_id, expert_id, index, "float32"))


def _mean(group: Group, part: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Return the mean of a part in float32, of its own memory; equal parts give the same bits."""
    reference = part(group.reference)
    mean = reference.clone()
    for expert_id, share in zip(group.expert_ids, group.shares, strict=True):
        if expert_id != group.reference and share > 0:
            mean.add_(part(expert_id) - reference, alpha=share)
    return mean


def merging_of(checkpoint: Checkpoint, seen: Seen, count: int) -> Merging:
    """Return the groups of every layer, weighted by the tokens that chose each expert.

    Experts of a group that no token chose have equal shares. With one expert a layer, its weight is
    always the same; where the weights of a token's experts do not sum to that, the factor is the
    mean of their sums on the calibration text.
    """
    gate = checkpoint.family.gate(checkpoint.config)
    num_groups = gate_groups(checkpoint, count)
    sums_are_equal = gate.renormalises or gate.score == "softmax_of_chosen"
    sums_are_equal = sums_are_equal or gate.norm_exponent == 1.0
    groups, factors = {}, {}
    for layer_id, found in seen.items():
        hits = found["hits"].astype(np.float64)
        groups[layer_id] = [
            _group(members, hits) for members in grouped(found["likeness"], count, num_groups)
        ]
        mean_sum = float(found["weights"].sum() / found["tokens"])
        factors[layer_id] = 1.0 if count > 1 or sums_are_equal else mean_sum / gate.scaling_factor
    return Merging(groups, factors)


def _group(members: Sequence[int], hits: np.ndarray) -> Group:
    used = hits[list(members)]
    shares = used / used.sum() if used.any() else np.full(len(members), 1 / len(members))
    return Group(tuple(members), tuple(shares.tolist()))


@dataclass(frozen=True)
class Merge(Command):
    """The command that writes a checkpoint with merged experts."""

    name = "merge"
    model: Checkpoint
    options: MergeOptions

    def plan(self, has_text: bool) -> Plan:
        """See :class:`Command`: for a number of experts that cannot be, for a missing text, and for
        a family without a dense class.
        """
        count, shape = self.options.experts, self.model.shape
        if not self.options.dense:
            check_count(self.model, count)
        elif count != 1:
            raise ConfigError(f"a dense model has --experts 1 (given: {count})", "--dense")
        else:
            check_dense(self.model)
        if not has_text:
            raise ConfigError("merging needs a calibration text", "--text")
        seen = {
            "hits": np.zeros(shape.num_experts),
            "weights": np.ones(1),
            "tokens": np.array(1),
            "likeness": np.zeros((shape.num_experts, shape.num_experts)),
        }
        any_merging = merging_of(self.model, dict.fromkeys(shape.layers, seen), count)
        try:
            return self._plan_of(any_merging)
        except CheckpointError as error:  # of DeepSeek's groups
            hint = ", but --dense is possible" if count == 1 else ""
            raise ConfigError(f"cannot be {count}: {error.message}{hint}", "--experts") from None

    def decide(self, text: Text | None, work: Path, on_progress: OnProgress) -> NewModel:
        """See :class:`Command`."""
        assert text is not None, "merging needs a text"
        by, count = self.options.by, self.options.experts
        observer = lambda layer_id: LikenessObserver(self.model, layer_id, by)  # noqa: E731
        seen = seen_on(self.model, text.calibration, work, observer, on_progress)
        merging = merging_of(self.model, seen, count)
        plan = self._plan_of(merging)
        facts = {
            "merged_experts": {
                str(layer_id): [group.expert_ids for group in groups]
                for layer_id, groups in merging.groups.items()
            }
        }
        if self.options.dense:
            line = "Each layer's experts are merged into one plain feed-forward layer."
            return NewModel(self.model, plan, line, facts, score_dense, _has_tensors)
        return NewModel(self.model, plan, f"Each layer's experts are merged into {count}.", facts)

    def _plan_of(self, merging: Merging) -> Plan:
        most_bytes = self.options.max_shard_size
        if self.options.dense:
            scaling = self.model.family.gate(self.model.config).scaling_factor
            scaled = {layer_id: factor * scaling for layer_id, factor in merging.factors.items()}
            expert = MergedExperts(self.model, Merging(merging.groups, scaled))
            return dense_plan(self.model, expert, most_bytes)
        config, new = (
            new_config(self.model, self.options.experts),
            MergedExperts(self.model, merging),
        )
        return make_plan(rewritten_source(self.model, config, new), STORED, most_bytes)


def _has_tensors(folder: Path) -> None:
    """Raise ``CheckpointError`` for a dense folder whose files are not whole."""
    read_headers(folder, read_json)
