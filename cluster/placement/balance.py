"""Where copies of experts should be, given their load: a pure function of today's placement.

First the busiest device of each layer, for which a router waits, gets little more load than the
mean device; then the busiest device over all layers. A device's load is the tokens that it computes
over its speed; the copies of an expert share its tokens evenly. Planning begins with today's copies
and changes only what pays, so few bytes move.

Letters: E experts of a layer, D devices, C copies of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError
from cluster.placement.board import Board, Device
from cluster.placement.copy_counts import copy_counts, warm_counts
from cluster.spec import ExpertKey, ModelExperts

TOLERANCE = 0.01
"""A layer is balanced where its busiest device has at most this part more load than the mean."""
GAIN = 0.005
"""The least gain that makes a moved copy worth its bytes, in the mean device's load."""
IDLE_SHARE = 0.01
"""Where cold copies are spread too, an expert without load has this part of the mean expert's."""
LEVEL_STEPS, LEVEL_LAYERS = 64, 3
"""Bounds of balancing all layers together: the number of steps, and the number of layers in which
the busiest device has the most load that each step chooses from."""


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly a placement spreads the load: 1 is perfect.

    ``layers`` is the busiest device's load of a layer over the mean device's, averaged over the
    layers by their load; ``devices`` is the same of all layers together.
    """

    layers: float
    devices: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The actors that are to hold each expert, and by actor the copies that come and go."""

    holders: dict[ExpertKey, tuple[str, ...]]
    added: dict[str, tuple[ExpertKey, ...]]
    dropped: dict[str, tuple[ExpertKey, ...]]
    moved_bytes: int
    before: Balance
    after: Balance

    @property
    def gain(self) -> float:
        """The load taken off the busiest device, in the mean device's load."""
        return max(self.before.layers - self.after.layers, self.before.devices - self.after.devices)


def plan_copies(
    models: Sequence[ModelExperts],
    devices: Sequence[Device],
    tokens_per_s: Mapping[ExpertKey, float],
    held: Mapping[str, Collection[ExpertKey]],
    min_copies: int = 1,
    max_copies: int | None = None,
) -> Plan:
    """Plan the holders of all experts, given what each actor has ``held`` until now.

    Each expert gets at least ``min_copies`` and at most ``max_copies``, by default one a device.
    Copies of an expert are on different devices, and on different nodes where there are several. No
    device holds more than its room. An expert without load counts for nothing, so without any load
    only missing copies are added. Deterministic. Raises :class:`ConfigError` where ``min_copies``
    of all experts do not fit.
    """
    most = min(max_copies or len(devices), len(devices))
    if min_copies > most:
        raise ConfigError(
            f"must be at most {most} (given: {min_copies})", "args.experts.min_copies"
        )
    board = Board(models, devices, tokens_per_s, held)
    before, started = _balance(board), board.has.copy()
    try:
        _arrange(board, (min_copies, most), is_needed_first=False)
    except ConfigError:  # further copies took the room of needed ones
        board = Board(models, devices, tokens_per_s, held)
        _arrange(board, (min_copies, most), is_needed_first=True)
    return _plan(board, started, before)


def _arrange(board: Board, bounds: tuple[int, int], is_needed_first: bool) -> None:
    """Bring every expert to its number of copies, and even out the load."""
    board.relieve_overfull()
    counts = copy_counts(
        board.rates,
        board.mean_shares(),
        board.counts(),
        board.expert_bytes,
        board.usable_bytes(),
        bounds,
    )
    for layer in board.layers:
        _drop(board, layer, counts)
    for layer in board.layers_by_load() if is_needed_first else ():
        _add(board, layer, np.full_like(counts, bounds[0]), bounds[0])
    for layer in board.layers_by_load():
        _add(board, layer, counts, bounds[0])
        _even_out(board, layer)
    _level(board)


def plan_without_cold(
    models: Sequence[ModelExperts],
    devices: Sequence[Device],
    tokens_per_s: Mapping[ExpertKey, float],
    held: Mapping[str, Collection[ExpertKey]],
    min_copies: int = 1,
) -> Plan:
    """Plan only to drop copies that carry next to nothing.

    The load must have been low for long: a layer without load keeps ``min_copies`` of each expert.
    Each expert keeps at least one copy. Experts without load count a little, so that the copies
    left are spread. The arguments are those of :func:`plan_copies`.
    """
    board = Board(models, devices, tokens_per_s, held)
    counts = warm_counts(board.rates, board.mean_shares(), board.counts(), min_copies)
    least = IDLE_SHARE * float(board.rates.mean()) or 1.0
    rates = {key: max(tokens_per_s.get(key, 0.0), least) for key in board.keys}
    board = Board(models, devices, rates, held)
    before, started = _balance(board), board.has.copy()
    for layer in board.layers:
        _drop(board, layer, counts)
    return _plan(board, started, before)


def balance_of(
    models: Sequence[ModelExperts],
    devices: Sequence[Device],
    tokens_per_s: Mapping[ExpertKey, float],
    held: Mapping[str, Collection[ExpertKey]],
) -> Balance:
    """Return how evenly the ``held`` copies spread the load."""
    return _balance(Board(models, devices, tokens_per_s, held))


def _drop(board: Board, layer: slice, wanted: np.ndarray) -> None:
    """Remove copies of experts that have more than ``wanted``, [N]."""
    board.exclude(layer)
    load = board.layer_load(layer, wanted)
    for expert in _hottest_first(board, layer, wanted):
        while board.count(expert) > wanted[expert]:
            device = board.worst_holder(expert, load)
            board.remove(expert, device)
            load[device] -= board.weight(expert, wanted[expert], device)
    board.include(layer)


def _add(board: Board, layer: slice, wanted: np.ndarray, min_copies: int) -> None:
    """Add copies up to ``wanted``, [N], beyond ``min_copies`` as far as there is room."""
    board.exclude(layer)
    load = board.layer_load(layer, wanted)
    for expert in _hottest_first(board, layer, wanted):
        weight = float(board.rates[expert] / wanted[expert])
        for count in range(board.count(expert), int(wanted[expert])):
            device = board.best_place(expert, load, weight, count < min_copies)
            if device is None:
                if count < min_copies:
                    raise ConfigError(
                        f"no device has room for copy {count + 1} of an expert",
                        "args.experts.memory_budget_bytes",
                    )
                break
            board.add(expert, device)
            load[device] += board.weight(expert, wanted[expert], device)
    board.include(layer)


def _hottest_first(board: Board, layer: slice, wanted: np.ndarray) -> list[int]:
    order = np.argsort(-board.rates[layer] / wanted[layer], kind="stable") + layer.start
    return order.tolist()


def _even_out(board: Board, layer: slice) -> None:
    """Move and exchange copies of a layer while that relieves its busiest device."""
    board.exclude(layer)
    load = board.layer_load(layer)
    mean = board.mean_of(layer)
    for _ in range(4 * len(load)):
        peak = int(load.argmax())
        if load[peak] <= (1 + TOLERANCE) * mean:
            break
        step = board.best_step(layer, load, peak)
        if step is None or step.gain < GAIN * mean:
            break
        board.apply(step, load)
    board.include(layer)


def _level(board: Board) -> None:
    """Even out all layers together; the busiest device of a layer gets no busier in it."""
    mean = float(board.total.mean())
    for _ in range(LEVEL_STEPS):
        peak = int(board.total.argmax())
        if board.total[peak] <= (1 + TOLERANCE) * mean:
            return
        best = None
        for layer in board.busiest_layers(peak, LEVEL_LAYERS):
            load = board.layer_load(layer)
            step = board.best_step(layer, board.total, peak, bound=load)
            if step is not None and (best is None or step.value > best[0].value):
                best = (step, layer)
        if best is None or best[0].gain < GAIN * mean:
            return
        board.apply(best[0], board.total)


def _balance(board: Board) -> Balance:
    peaks = means = 0.0
    for layer in board.layers:
        peaks += float(board.layer_load(layer).max())
        means += board.mean_of(layer)
    if means == 0:
        return Balance(1.0, 1.0)
    return Balance(peaks / means, float(board.total.max()) / means)


def _plan(board: Board, started: np.ndarray, before: Balance) -> Plan:
    added = _by_actor(board, board.has & ~started)
    holders = {
        key: tuple(board.actor_ids[d] for d in np.flatnonzero(board.has[e]).tolist())
        for e, key in enumerate(board.keys)
    }
    return Plan(
        holders=holders,
        added=added,
        dropped=_by_actor(board, started & ~board.has),
        moved_bytes=int(((board.has & ~started).sum(axis=1) * board.expert_bytes).sum()),
        before=before,
        after=_balance(board),
    )


def _by_actor(board: Board, changed: np.ndarray) -> dict[str, tuple[ExpertKey, ...]]:
    return {
        board.actor_ids[device]: tuple(
            board.keys[e] for e in np.flatnonzero(changed[:, device]).tolist()
        )
        for device in np.flatnonzero(changed.any(axis=0)).tolist()
    }
