"""The controller's own rules for copies, against traces of load, without any cluster.

    python -m benchmarks.simulate [--devices N] [--layers N] [--experts N] [--slots N] [--steps N]
        [--period S] [--seed N] [--json FILE] [--compare OLD.json]

Each step is a period between two rebalancings. Tokens are drawn from the trace of that moment and
counted by the devices that hold the experts; the load is what :mod:`cluster.placement.load` makes
of their reports, the plan :mod:`cluster.placement.balance`'s. Printed is the busiest device over
the mean one, by layer, under the load that comes after the decision: as the experts were placed at
first, and as they were after each plan; then what the plans had to load and how long they took to
make. All of it follows from the seed, but the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.common import Figure, finish, machine, output_options, progress, show
from cluster.controller.rebalance import WORTH_GAIN
from cluster.placement.balance import balance_of, plan_copies, plan_without_cold
from cluster.placement.board import Device
from cluster.placement.load import LoadTracker
from cluster.placement.placement import assign_experts
from cluster.spec import ActorReport, ExpertKey, ModelExperts

EXPERT_BYTES = 44_040_192
"""An expert of DeepSeek-V3 in fp8: three matrices of 7168 x 2048."""
TOKENS_PER_S = 20_000
"""Rows of each layer in all."""
DEVICES_A_NODE = 8

Loads = np.ndarray
"""One for each expert, [layers, experts]."""


@dataclass(slots=True)
class Trace:
    """How the logarithms of a layer's loads change from step to step, and which node is away when.

    ``walk`` is kept for the steps that follow, ``burst`` is not.
    """

    exponent: float = 1.0
    walk: Callable[[Loads, np.random.Generator], Loads] = lambda logs, source: logs
    burst: Callable[[Loads, int], Loads] = lambda logs, step: logs
    lost: Callable[[int], int | None] = lambda step: None


def _flash(logs: Loads, step: int) -> Loads:
    """Every tenth step two other experts of each layer become twenty times as hot, for five."""
    changed = logs.copy()
    if step % 10 < 5:
        hot = np.random.default_rng(step // 10).integers(0, logs.shape[1], (logs.shape[0], 2))
        np.put_along_axis(changed, hot, np.take_along_axis(logs, hot, 1) + np.log(20), 1)
    return changed


TRACES: dict[str, Trace] = {
    "even": Trace(exponent=0.0),
    "zipf": Trace(),
    "drifting": Trace(walk=lambda logs, source: logs + source.normal(0, 0.1, logs.shape)),
    "flash crowd": Trace(burst=_flash),
    "node lost": Trace(lost=lambda step: 0 if 10 <= step < 20 else None),
}


@dataclass(slots=True)
class Outcome:
    """What came of one trace, a value a step."""

    static: list[float] = field(default_factory=list)
    balanced: list[float] = field(default_factory=list)
    moved_bytes: list[int] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)
    plans: int = 0

    def to_json(self) -> dict[str, float]:
        """Return the figures."""
        return {
            "static_balance": float(np.mean(self.static)),
            "balance": float(np.mean(self.balanced)),
            "worst_balance": max(self.balanced),
            "first_gb": self.moved_bytes[0] / 1e9,
            "gb_a_step": float(np.mean(self.moved_bytes[1:])) / 1e9,
            "plans": self.plans,
            "plan_s": max(self.plan_s),
        }


class Simulation:
    """Devices that hold experts, and count what a trace sends them."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Place the experts as a deployment does that knows no load."""
        layers, experts = options.layers, options.experts
        self.models = [ModelExperts("m", tuple(range(layers)), experts, EXPERT_BYTES)]
        room_bytes = options.slots * EXPERT_BYTES
        self.devices = [
            Device(f"d{i:05}", f"n{i // DEVICES_A_NODE}", room_bytes)
            for i in range(options.devices)
        ]
        self.period_s = options.period
        actor_ids = [device.actor_id for device in self.devices]
        self.first = assign_experts(self.models, actor_ids, dict.fromkeys(actor_ids, room_bytes))
        self._counted: dict[str, dict[ExpertKey, int]] = {actor_id: {} for actor_id in actor_ids}

    def run(self, trace: Trace, steps: int, seed: int, begin: Callable[[str], None]) -> Outcome:
        """Play a trace; the same seed gives the same tokens."""
        source = np.random.default_rng(seed)
        shape = (len(self.models[0].layers), self.models[0].num_experts)
        logs = -trace.exponent * np.log(np.arange(1, shape[1] + 1)) * np.ones(shape)
        logs = source.permuted(logs, axis=1)
        tracker, held, outcome = LoadTracker(0.0), self.first, Outcome()
        self._report(tracker, 0.0, {}, {})
        for step in range(steps):
            begin(f"step {step}")
            now_s = (step + 1) * self.period_s
            logs = logs if step == 0 else trace.walk(logs, source)
            shares = np.exp(trace.burst(logs, step))
            shares /= shares.sum(axis=1, keepdims=True)
            rates = self._rates(shares)
            devices = self._living(trace.lost(step))
            outcome.static.append(balance_of(self.models, devices, rates, self.first).layers)
            outcome.balanced.append(balance_of(self.models, devices, rates, held).layers)
            counts = source.poisson(shares * TOKENS_PER_S * self.period_s)
            self._report(tracker, now_s, held, self._by_key(counts))
            held = self._plan(tracker, now_s, devices, held, outcome)
        return outcome

    def _living(self, lost_node: int | None) -> list[Device]:
        return [device for device in self.devices if device.node != f"n{lost_node}"]

    def _plan(
        self,
        tracker: LoadTracker,
        now_s: float,
        devices: Sequence[Device],
        held: Mapping[str, Sequence[ExpertKey]],
        outcome: Outcome,
    ) -> dict[str, list[ExpertKey]]:
        living = {d.actor_id: held.get(d.actor_id, ()) for d in devices}
        began_s = time.perf_counter()
        rates = tracker.tokens_per_s(now_s)
        plan = plan_copies(self.models, devices, rates, living)
        outcome.plan_s.append(time.perf_counter() - began_s)
        is_whole = {key for keys in living.values() for key in keys} == plan.holders.keys()
        if is_whole and plan.gain < WORTH_GAIN:
            if now_s < tracker.fall_s:
                outcome.moved_bytes.append(0)
                return {actor_id: list(keys) for actor_id, keys in living.items()}
            plan = plan_without_cold(self.models, devices, rates, living)
        outcome.moved_bytes.append(plan.moved_bytes)
        outcome.plans += bool(plan.added or plan.dropped)
        after: dict[str, list[ExpertKey]] = {device.actor_id: [] for device in devices}
        for key, actors in plan.holders.items():
            for actor_id in actors:
                after[actor_id].append(key)
        return after

    def _report(
        self,
        tracker: LoadTracker,
        now_s: float,
        held: Mapping[str, Sequence[ExpertKey]],
        counts: Mapping[ExpertKey, int],
    ) -> None:
        """Have every device report what it has computed; an expert's first copy does all of it."""
        counted = self._counted
        if not counts:
            counted = self._counted = {actor_id: {} for actor_id in self._counted}
        done: set[ExpertKey] = set()
        for actor_id, tokens in counted.items():
            for key in held.get(actor_id, ()):
                if key not in done and key in counts:
                    done.add(key)
                    tokens[key] = tokens.get(key, 0) + counts[key]
            tracker.observe(_report_of(actor_id, dict(tokens)), now_s)

    def _rates(self, shares: Loads) -> dict[ExpertKey, float]:
        return {key: float(shares[key.layer_id, key.expert_id]) for key in self._keys()}

    def _by_key(self, counts: np.ndarray) -> dict[ExpertKey, int]:
        return {key: int(counts[key.layer_id, key.expert_id]) for key in self._keys()}

    def _keys(self) -> list[ExpertKey]:
        return self.models[0].expert_keys()


def _report_of(actor_id: str, tokens: dict[ExpertKey, int]) -> ActorReport:
    return ActorReport(actor_id, 1, "", 1, 1, "", "", (), 0, tokens, 0, 0)


def report(result: Mapping[str, Any]) -> None:
    """Print a row for each trace."""
    rows = [
        (
            name,
            f"{told['static_balance']:.2f}",
            f"{told['balance']:.2f}",
            f"{told['worst_balance']:.2f}",
            f"{told['first_gb']:.1f}",
            f"{told['gb_a_step']:.2f}",
            f"{told['plans']:.0f}",
            f"{1000 * told['plan_s']:.0f}",
        )
        for name, told in result["figures"].items()
    ]
    columns = (
        "trace", "as placed", "balanced", "at worst", "GB at first", "GB a step", "plans", "plan ms"
    )  # fmt: skip
    show("busiest device over the mean one, by layer", rows, columns)


def comparable(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by."""
    return {
        f"{trace}, {name}": Figure(told[name], "lower")
        for trace, told in result["figures"].items()
        for name in ("balance", "gb_a_step", "plan_s")
    }


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("devices", 32), ("layers", 8), ("experts", 64), ("slots", 24)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--period", type=float, default=10.0, help="seconds between two plans")
    parser.add_argument("--seed", type=int, default=0)
    output_options(parser)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "simulate", "machine": machine(), "figures": {}}
    simulation = Simulation(options)
    with progress("simulate", options.steps * len(TRACES)) as begin:
        for name, trace in TRACES.items():
            outcome = simulation.run(trace, options.steps, options.seed, begin)
            result["figures"][name] = outcome.to_json()
    report(result)
    return finish(result, comparable(result), options)


if __name__ == "__main__":
    sys.exit(main())
