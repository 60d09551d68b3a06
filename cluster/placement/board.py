"""The board on which :mod:`cluster.placement.balance` moves copies: holders and loads as arrays.

Letters: N experts of all layers, E experts of a layer, D devices, C copies of a layer, A of them on
one device, M nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.spec import ExpertKey, ModelExperts


@dataclass(frozen=True, slots=True)
class Device:
    """One actor's device: what it may hold, and how fast it is beside others of the cluster.

    ``room_bytes`` is for experts' weights. Copies come before others go, so a device keeps room
    for one more expert free where it takes any.
    """

    actor_id: str
    node: str
    room_bytes: float
    speed: float = 1.0


class Step(NamedTuple):
    """A copy of ``expert`` that moves from device ``source`` to ``target``.

    With ``other``, a copy of that expert moves the other way. ``gain`` is the load that this takes
    off the busier of the two devices, ``value`` the gain a copy that has to be loaded.
    """

    expert: int
    source: int
    target: int
    other: int | None
    gain: float
    value: float


class Board:
    """Copies on devices, changed in place; every load is tokens a second over speed."""

    def __init__(
        self,
        models: Sequence[ModelExperts],
        devices: Sequence[Device],
        tokens_per_s: Mapping[ExpertKey, float],
        held: Mapping[str, Collection[ExpertKey]],
    ) -> None:
        """Set up what is ``held``; experts and devices that are not given are left out."""
        self.keys = [key for model in models for key in model.expert_keys()]
        self.actor_ids = [device.actor_id for device in devices]
        self.rates = np.array([max(tokens_per_s.get(key, 0.0), 0.0) for key in self.keys])
        self.layers: list[slice] = []
        sizes: list[int] = []
        for model in models:
            for _ in model.layers:
                begin = len(sizes)
                sizes += [model.expert_bytes] * model.num_experts
                self.layers.append(slice(begin, len(sizes)))
        self.expert_bytes = np.array(sizes, dtype=np.int64)
        self._layer_of = np.repeat(
            np.arange(len(self.layers)), [layer.stop - layer.start for layer in self.layers]
        )
        speeds = np.array([device.speed for device in devices])
        self._speed = speeds / speeds.mean()
        self._reserve_bytes = int(self.expert_bytes.max())
        names = sorted({device.node for device in devices})
        self._node = np.array([names.index(device.node) for device in devices])
        self.has = np.zeros((len(self.keys), len(devices)), dtype=bool)  # [N, D]
        place_of = {key: place for place, key in enumerate(self.keys)}
        for device, actor_id in enumerate(self.actor_ids):
            held_here = [place_of[key] for key in held.get(actor_id, ()) if key in place_of]
            self.has[held_here, device] = True
        self._on_node = np.zeros((len(self.keys), len(names)), dtype=np.int32)  # [N, M]
        for device, node in enumerate(self._node.tolist()):
            self._on_node[:, node] += self.has[:, device]
        used_bytes = [float(self.expert_bytes[held].sum()) for held in self.has.T]
        self._used_bytes = np.array(used_bytes)
        self._free_bytes = np.array([device.room_bytes for device in devices]) - used_bytes
        self.total = np.zeros(len(devices))
        for layer in self.layers:
            self.include(layer)

    # Reading the board.

    def counts(self) -> np.ndarray:
        """Return the number of copies of each expert, [N]."""
        return self.has.sum(axis=1)

    def count(self, expert: int) -> int:
        """Return the number of copies of one expert."""
        return int(np.count_nonzero(self.has[expert]))

    def mean_of(self, layer: slice) -> float:
        """Return the mean device's load of a layer."""
        return float(self.rates[layer].sum()) / len(self._speed)

    def mean_shares(self) -> np.ndarray:
        """Return the mean device's load of each expert's layer, [N]."""
        return np.array([self.mean_of(layer) for layer in self.layers])[self._layer_of]

    def usable_bytes(self) -> float:
        """Return the bytes that whole experts may take, without the reserve of each device."""
        room = self._used_bytes + np.maximum(self._free_bytes - self._reserve_bytes, 0.0)
        return float((room // self._reserve_bytes * self._reserve_bytes).sum())

    def layers_by_load(self) -> list[slice]:
        """Return the layers, those with the most load first."""
        return sorted(self.layers, key=lambda layer: -float(self.rates[layer].sum()))

    def busiest_layers(self, device: int, count: int) -> list[slice]:
        """Return the layers in which a device has the most to do, at most ``count``."""
        here = np.flatnonzero(self.has[:, device])
        weights = self.rates[here] / self.has[here].sum(axis=1)
        by_layer = np.bincount(self._layer_of[here], weights, minlength=len(self.layers))
        busiest = np.argsort(-by_layer, kind="stable")[:count].tolist()
        return [self.layers[layer] for layer in busiest if by_layer[layer] > 0]

    def layer_load(self, layer: slice, counts: np.ndarray | None = None) -> np.ndarray:
        """Return each device's load of a layer, [D], with ``counts`` in place of today's, [N]."""
        has = self.has[layer]
        layer_counts = has.sum(axis=1) if counts is None else counts[layer]
        weights = self.rates[layer] / np.maximum(layer_counts, 1)
        return (weights @ has) / self._speed

    def weight(self, expert: int, count: int, device: int) -> float:
        """Return the load of one of ``count`` copies of an expert on a device."""
        return float(self.rates[expert] / count / self._speed[device])

    # Changing it.

    def exclude(self, layer: slice) -> None:
        """Take a layer's load out of the total until :meth:`include`."""
        self.total -= self.layer_load(layer)

    def include(self, layer: slice) -> None:
        """Put a layer's load back into the total."""
        self.total += self.layer_load(layer)

    def add(self, expert: int, device: int) -> None:
        """Add a copy."""
        self.has[expert, device] = True
        self._on_node[expert, self._node[device]] += 1
        self._used_bytes[device] += self.expert_bytes[expert]
        self._free_bytes[device] -= self.expert_bytes[expert]

    def remove(self, expert: int, device: int) -> None:
        """Remove a copy."""
        self.has[expert, device] = False
        self._on_node[expert, self._node[device]] -= 1
        self._used_bytes[device] -= self.expert_bytes[expert]
        self._free_bytes[device] += self.expert_bytes[expert]

    def relieve_overfull(self) -> None:
        """Remove copies from devices that hold more than their room, the coldest first."""
        for device in np.flatnonzero(self._free_bytes < 0).tolist():
            here = np.flatnonzero(self.has[:, device])
            for expert in here[self.rates[here].argsort(kind="stable")].tolist():
                if self._free_bytes[device] >= 0:
                    break
                self.remove(expert, device)
        self.total[:] = 0
        for layer in self.layers:
            self.include(layer)

    def worst_holder(self, expert: int, load: np.ndarray) -> int:
        """Return the device that best loses its copy: beside another on its node, or busiest."""
        holders = np.flatnonzero(self.has[expert])
        is_alone = self._on_node[expert, self._node[holders]] == 1
        worst = np.lexsort((-self.total[holders], -load[holders], is_alone))[0]
        return int(holders[worst])

    def best_place(
        self, expert: int, load: np.ndarray, weight: float, is_needed: bool
    ) -> int | None:
        """Return the device for another copy; ``None`` if none has room.

        A copy that ``is_needed`` may take the room that is reserved for changes.
        """
        num_bytes = self.expert_bytes[expert]
        is_other = ~self.has[expert]
        candidates = np.flatnonzero(
            (self._free_bytes >= num_bytes + self._reserve_bytes) & is_other
        )
        if len(candidates) == 0 and is_needed:
            candidates = np.flatnonzero((self._free_bytes >= num_bytes) & is_other)
        if len(candidates) == 0:
            return None
        is_new = self._on_node[expert, self._node[candidates]] == 0
        candidates = candidates[is_new] if is_new.any() else candidates
        added = weight / self._speed
        peak = load.max()
        # Where one copy is too hot for its layer to be even, the load of all layers decides.
        is_hopeless = peak > 2 * load.mean()
        after = np.maximum(load + added, peak if is_hopeless else 0.0)
        total = self.total + added
        for cost in (after, total):
            is_least = cost[candidates] <= cost[candidates].min() * (1 + 1e-9)
            candidates = candidates[is_least]
        return int(candidates[self._free_bytes[candidates].argmax()])

    # Improving it.

    def best_step(
        self, layer: slice, load: np.ndarray, peak: int, bound: np.ndarray | None = None
    ) -> Step | None:
        """Return the step that takes most off device ``peak`` for each copy that moves.

        ``load`` is to become even, [D]. ``bound`` is the layer's own load where ``load`` is of all
        layers: no device may become busier in the layer than the busiest is.
        """
        has = self.has[layer]  # [E, D]
        own = np.flatnonzero(has[:, peak])  # [A]
        counts = has.sum(axis=1)
        weights = self.rates[layer] / np.maximum(counts, 1)
        own = own[weights[own] > 0]
        if len(own) == 0:
            return None
        on_node = self._on_node[layer]  # [E, M]
        is_same_node = self._node == self._node[peak]
        # The only copy of a node may not go to a node that has another.
        is_alone = on_node[own, self._node[peak]] == 1  # [A]
        is_new = (on_node[own][:, self._node] == 0) | is_same_node  # [A, D]
        may_take = ~has[own] & (is_new | ~is_alone[:, None])  # [A, D]
        num_bytes = self.expert_bytes[layer.start]
        has_room = self._free_bytes >= num_bytes + self._reserve_bytes
        heavy = weights[own][:, None]
        moved = self._gain(load, peak, heavy, np.arange(len(load)), bound)
        moved = np.where(may_take & has_room, moved, -np.inf)
        a, d = np.unravel_index(moved.argmax(), moved.shape)
        best = Step(
            int(own[a]) + layer.start, peak, int(d), None, float(moved[a, d]), float(moved[a, d])
        )
        is_spare = self._free_bytes >= self._reserve_bytes
        if is_spare[peak]:
            swap = self._best_swap(layer, load, peak, bound, own, may_take, on_node, weights)
            if swap is not None and swap.value > best.value:
                best = swap
        return best if best.gain > 0 else None

    def _best_swap(
        self,
        layer: slice,
        load: np.ndarray,
        peak: int,
        bound: np.ndarray | None,
        own: np.ndarray,
        may_take: np.ndarray,
        on_node: np.ndarray,
        weights: np.ndarray,
    ) -> Step | None:
        has = self.has[layer]
        is_spare = self._free_bytes >= self._reserve_bytes
        is_offered = has & is_spare & ~has[:, peak][:, None]  # [E, D]
        # Far faster than np.nonzero of two dimensions.
        experts, devices = np.divmod(np.flatnonzero(is_offered), has.shape[1])  # [C]
        if len(experts) == 0:
            return None
        is_same_node = self._node[devices] == self._node[peak]
        is_alone = on_node[experts, self._node[devices]] == 1  # [C]
        comes = ~is_alone | is_same_node | (on_node[experts, self._node[peak]] == 0)
        lighter = weights[own][:, None] - weights[experts][None, :]  # [A, C]
        gains = self._gain(load, peak, lighter, devices, bound)
        gains = np.where(may_take[:, devices] & comes & (lighter > 0), gains, -np.inf)
        a, c = np.unravel_index(gains.argmax(), gains.shape)
        gain = float(gains[a, c])
        expert, other = int(own[a]) + layer.start, int(experts[c]) + layer.start
        return Step(expert, peak, int(devices[c]), other, gain, gain / 2)

    def _gain(
        self,
        load: np.ndarray,
        peak: int,
        weights: np.ndarray,
        devices: np.ndarray,
        bound: np.ndarray | None,
    ) -> np.ndarray:
        """Return the gain of moving ``weights`` [A, 1 or C] to ``devices`` [C], [A, C]."""
        after_peak = load[peak] - weights / self._speed[peak]
        added = weights / self._speed[devices]
        after = load[devices] + added
        gain = load[peak] - np.maximum(after_peak, after)
        if bound is not None:
            gain = np.where(bound[devices] + added <= bound.max() * (1 + 1e-9), gain, -np.inf)
        return gain

    def apply(self, step: Step, load: np.ndarray) -> None:
        """Take a step, and change ``load`` with it."""
        count = self.count(step.expert)
        load[step.source] -= self.weight(step.expert, count, step.source)
        load[step.target] += self.weight(step.expert, count, step.target)
        self.remove(step.expert, step.source)
        self.add(step.expert, step.target)
        if step.other is None:
            return
        count = self.count(step.other)
        load[step.target] -= self.weight(step.other, count, step.target)
        load[step.source] += self.weight(step.other, count, step.source)
        self.remove(step.other, step.target)
        self.add(step.other, step.source)
