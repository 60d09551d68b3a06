"""Merging: the experts of a layer into fewer, or into one.

Dimension letters: E experts of a layer, N of the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.errors import CheckpointError, ConfigError
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.config import read_json
from experts.checkpoint.expert_weights import read_part
from experts.checkpoint.shards import read_headers
from experts.convert.plan import STORED, Plan, make_plan
from experts.convert.staging import check_dest
from router.workshop.folders.alignment import (
    DOWN,
    DOWN_BIAS,
    assignment_bytes,
    in_order,
    neuron_orders,
)
from router.workshop.folders.card import Record
from router.workshop.folders.dense import check_dense, dense_plan, score_dense
from router.workshop.folders.grouping import Alike, LikenessObserver, grouped
from router.workshop.folders.making import (
    NewModel,
    OnProgress,
    Recipe,
    make_folder,
    origin_of,
    score_served,
    seen_on,
)
from router.workshop.folders.passes import Seen
from router.workshop.folders.rewritten import check_count, gate_groups, new_config, rewritten_source
from router.workshop.folders.text import Text, read_text


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What decides a merged model; ``dense`` writes one expert a layer as a plain dense model."""

    experts: int
    by: Alike = "output"
    dense: bool = False
    sequences: int = 64
    sequence_length: int = 256
    max_shard_size: int = 5_000_000_000


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


class MergedExperts:
    """The merged experts of a checkpoint; see :class:`rewritten.NewExperts`.

    A merged expert is the mean of its group by shares, its neurons in the reference's order.
    """

    def __init__(self, checkpoint: Checkpoint, merging: Merging) -> None:
        self._checkpoint = checkpoint
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
        checkpoint, shape = self._checkpoint, self._checkpoint.shape
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
        tensors = self._checkpoint.family.expert_tensors(
            self._checkpoint.config, layer_id, expert_id
        )
        return [self._part(layer_id, expert_id, index) for index in range(len(tensors.parts()))]

    def _part(self, layer_id: int, expert_id: int, index: int) -> torch.Tensor:
        """Return a part of an expert in its own dtype, or in float32 where it is quantised."""
        checkpoint = self._checkpoint
        tensors = checkpoint.family.expert_tensors(checkpoint.config, layer_id, expert_id)
        return from_array(read_part(checkpoint, tensors.parts()[index], "float32"))


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


def prepare_merge(
    checkpoint: Checkpoint, dest: Path, options: MergeOptions, texts: Sequence[Path]
) -> tuple[Plan, Text]:
    """Check everything before the first step; returns a plan and the text.

    The plan has the sizes of every merging with these options. Raises ``ConfigError`` for a wrong
    ``dest``, for a number of experts that cannot be, for a missing text and for a family without a
    dense class, and as :func:`router.workshop.folders.text.read_text` does.
    """
    check_dest(dest)
    _check_count(checkpoint, options)
    if not texts:
        raise ConfigError("merging needs a calibration text", "--text")
    shape = checkpoint.shape
    seen = {
        "hits": np.zeros(shape.num_experts),
        "weights": np.ones(1),
        "tokens": np.array(1),
        "likeness": np.zeros((shape.num_experts, shape.num_experts)),
    }
    any_merging = merging_of(checkpoint, dict.fromkeys(shape.layers, seen), options.experts)
    try:
        plan = _plan(checkpoint, options, any_merging)
    except CheckpointError as error:  # of DeepSeek's groups
        hint = ", but --dense is possible" if options.experts == 1 else ""
        raise ConfigError(
            f"cannot be {options.experts}: {error.message}{hint}", "--experts"
        ) from None
    return plan, read_text(checkpoint, texts, options.sequences, options.sequence_length)


def _check_count(checkpoint: Checkpoint, options: MergeOptions) -> None:
    count = options.experts
    if options.dense:
        if count != 1:
            raise ConfigError(f"a dense model has --experts 1 (given: {count})", "--dense")
        check_dense(checkpoint)
    else:
        check_count(checkpoint, count)


def _plan(checkpoint: Checkpoint, options: MergeOptions, merging: Merging) -> Plan:
    if options.dense:
        scaling = checkpoint.family.gate(checkpoint.config).scaling_factor
        scaled = {layer_id: factor * scaling for layer_id, factor in merging.factors.items()}
        expert = MergedExperts(checkpoint, Merging(merging.groups, scaled))
        return dense_plan(checkpoint, expert, options.max_shard_size)
    config = new_config(checkpoint, options.experts)
    source = rewritten_source(checkpoint, config, MergedExperts(checkpoint, merging))
    return make_plan(source, STORED, options.max_shard_size)


def merge(
    checkpoint: Checkpoint,
    dest: Path,
    options: MergeOptions,
    texts: Sequence[Path],
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Record:
    """Write the checkpoint with merged experts to the folder ``dest``; returns its record.

    Raises as :func:`prepare_merge` and :func:`router.workshop.folders.making.make_folder` do.
    """
    plan, text = prepare_merge(checkpoint, dest, options, texts)

    def decide(work: Path) -> NewModel:
        seen = seen_on(
            checkpoint,
            text.calibration,
            work,
            lambda layer_id: LikenessObserver(checkpoint, layer_id, options.by),
            on_progress,
        )
        merging = merging_of(checkpoint, seen, options.experts)
        made = _plan(checkpoint, options, merging)
        facts = {
            "merged_experts": {
                str(layer_id): [group.expert_ids for group in groups]
                for layer_id, groups in merging.groups.items()
            }
        }
        if options.dense:
            line = "Each layer's experts are merged into one plain feed-forward layer."
            return NewModel(checkpoint, made, score_dense, _has_tensors, (line,), facts)
        line = f"Each layer's experts are merged into {options.experts}."
        return NewModel(checkpoint, made, score_served, open_checkpoint, (line,), facts)

    origin, recipe = origin_of(checkpoint), Recipe("merge", asdict(options))
    return make_folder(origin, plan.source, dest, recipe, text, decide, on_progress)


def _has_tensors(folder: Path) -> None:
    """Raise ``CheckpointError`` for a dense folder whose files are not whole."""
    read_headers(folder, read_json)
