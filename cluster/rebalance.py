"""Rebalancing: load as it is reported, a plan for it, and the changes that bring it about."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence

from cluster.balance import Balance, Device, Plan, balance_of, plan_copies
from cluster.batches import batches
from cluster.changes import Changes, Cluster
from cluster.errors import ExpertMeshError, UnavailableError
from cluster.load import WINDOW_S, LoadTracker
from cluster.load_status import DeviceStatus, ExpertLoad, LoadStatus, Move, RebalanceReport
from cluster.placement import ExpertKey, ModelExperts

WORTH_GAIN = 0.05
"""By itself the controller moves nothing for less than this off the busiest device's load, in mean
devices' loads; measured loads waver by some percent."""
KEPT_REPORTS = 16
LOGGED_MOVES = 20

logger = logging.getLogger("expertmesh.rebalance")


class Rebalancer:
    """Keeps the load of one application's experts, and spreads it when asked to."""

    def __init__(
        self,
        models: Sequence[ModelExperts],
        pool_of: Mapping[str, str],
        budgets_bytes: Mapping[str, int] | None,
        min_copies: int,
        cluster: Cluster,
        changes: Changes,
    ) -> None:
        """``pool_of`` names each actor's pool, in which devices are alike.

        Without budgets nobody knows what a device has room for: then no expert gets more than
        ``min_copies``, and no device more than the fullest one has.
        """
        self.tracker = LoadTracker(time.monotonic())
        self._models = models
        self._expert_bytes = {model.model: model.expert_bytes for model in models}
        self._pool_of = pool_of
        self._budgets_bytes = budgets_bytes
        self._min_copies = min_copies
        self._cluster = cluster
        self._changes = changes
        self._one_at_a_time = asyncio.Lock()
        self._reports: deque[RebalanceReport] = deque(maxlen=KEPT_REPORTS)

    async def run_forever(self, period_s: float) -> None:
        """Rebalance again and again where that is worth it."""
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.rebalance(least_gain=WORTH_GAIN)
            except ExpertMeshError as error:
                logger.info("not rebalanced: %s", error)
            except Exception:
                logger.exception("unexpected failure; trying again")

    async def rebalance(self, dry_run: bool = False, least_gain: float = 0.0) -> RebalanceReport:
        """Spread the load of now; returns when that is done, or at once with what would be.

        A plan that takes less than ``least_gain`` off the busiest device's load is not carried out.
        Raises :class:`UnavailableError` while an expert has fewer copies than it is to have. Where
        a change fails, those before it stay, which is told in the report.
        """
        async with self._one_at_a_time:
            began_s = time.monotonic()
            devices = self._devices()
            rates = self.tracker.tokens_per_s(began_s)
            held = {actor_id: list(keys) for actor_id, keys in self._changes.shares.items()}
            most = self._min_copies if self._budgets_bytes is None else None
            plan = await asyncio.to_thread(
                plan_copies, self._models, devices, rates, held, self._min_copies, most
            )
            gain = max(
                plan.before.layers - plan.after.layers, plan.before.devices - plan.after.devices
            )
            if not (plan.added or plan.dropped) or gain < least_gain:
                return self._report("balanced", plan, (), 0, plan.before, began_s)
            moves = _moves(plan)
            self._explain(plan, moves, rates, dry_run)
            if dry_run:
                return self._report("planned", plan, moves, plan.moved_bytes, plan.after, began_s)
            outcome = await self._carry_out(plan, devices, held)
            done = [move for move in moves if self._is_done(move)]
            report = self._report(
                outcome,
                plan,
                done,
                sum(self._expert_bytes[move.model] for move in done if move.is_added),
                balance_of(self._models, devices, rates, self._changes.shares),
                began_s,
            )
            logger.info("rebalancing is %s after %.1f s", outcome, report.took_s)
            self._reports.appendleft(report)
            return report

    async def _carry_out(
        self, plan: Plan, devices: Sequence[Device], held: Mapping[str, Sequence[ExpertKey]]
    ) -> str:
        free_bytes = {
            device.actor_id: device.room_bytes
            - sum(self._expert_bytes[key.model] for key in held[device.actor_id])
            for device in devices
        }
        try:
            for change in batches(plan.added, plan.dropped, free_bytes, self._expert_bytes):
                await self._changes.apply(change)
        except ExpertMeshError as error:
            return f"failed: {error}"
        return "committed"

    def _is_done(self, move: Move) -> bool:
        key = ExpertKey(move.model, move.layer, move.expert)
        return (key in self._changes.shares[move.actor_id]) == move.is_added

    def _devices(self) -> list[Device]:
        placement, reports = self._cluster.placement, self._cluster.reports
        away = [a for a in self._changes.shares if a not in placement.generations]
        if away or placement.fewest_copies() < self._min_copies:
            who = f"while {', '.join(away)} is away" if away else "while copies are missing"
            raise UnavailableError(f"copies are not moved {who}", "", 1.0)
        speeds = self.tracker.speeds(self._pool_of, time.monotonic())
        usual = sum(speeds.values()) / len(speeds) if speeds else 1.0
        rooms = self._rooms_bytes()
        return [
            Device(
                actor_id,
                reports[actor_id].node if actor_id in reports else actor_id,
                rooms[actor_id],
                speeds.get(actor_id, usual),
            )
            for actor_id in self._changes.shares
        ]

    def _rooms_bytes(self) -> Mapping[str, float]:
        if self._budgets_bytes is not None:
            return self._budgets_bytes
        used = {
            actor_id: sum(self._expert_bytes[key.model] for key in keys)
            for actor_id, keys in self._changes.shares.items()
        }
        return dict.fromkeys(used, max(used.values()) + max(self._expert_bytes.values()))

    def _explain(
        self, plan: Plan, moves: Sequence[Move], rates: Mapping[ExpertKey, float], dry_run: bool
    ) -> None:
        logger.info(
            "%s: busiest over mean device %.2f -> %.2f by layer, %.2f -> %.2f in all; %d copies "
            "come, %d go, %.1f MB to load",
            "would rebalance" if dry_run else "rebalancing",
            plan.before.layers,
            plan.after.layers,
            plan.before.devices,
            plan.after.devices,
            sum(move.is_added for move in moves),
            sum(not move.is_added for move in moves),
            plan.moved_bytes / 1e6,
        )
        for move in moves[:LOGGED_MOVES]:
            key = ExpertKey(move.model, move.layer, move.expert)
            logger.info(
                "%s layer %d expert %d, %.0f tokens/s: %s %s; %d copies then",
                *key,
                rates.get(key, 0.0),
                "a copy comes to" if move.is_added else "its copy goes from",
                move.actor_id,
                len(plan.holders[key]),
            )

    def _report(
        self,
        outcome: str,
        plan: Plan,
        moves: Sequence[Move],
        moved_bytes: int,
        after: Balance,
        began_s: float,
    ) -> RebalanceReport:
        placement = self._cluster.placement
        return RebalanceReport(
            outcome=outcome,
            moves=tuple(moves),
            moved_bytes=moved_bytes,
            layers_before=plan.before.layers,
            layers_after=after.layers,
            devices_before=plan.before.devices,
            devices_after=after.devices,
            at_s=time.time(),
            took_s=time.monotonic() - began_s,
            epoch=placement.epoch,
            version=placement.version,
        )

    def load(self) -> LoadStatus:
        """Return the load of every expert and device, and what was rebalanced lately."""
        now_s = time.monotonic()
        rates, loads = self.tracker.tokens_per_s(now_s), self.tracker.devices(now_s)
        placement, reports = self._cluster.placement, self._cluster.reports
        living = [
            Device(actor_id, reports[actor_id].node, 0.0)
            for actor_id in sorted(reports)
            if actor_id in placement.generations
        ]
        balance = Balance(1.0, 1.0)
        if living:
            held = {device.actor_id: reports[device.actor_id].experts for device in living}
            balance = balance_of(self._models, living, rates, held)
        return LoadStatus(
            window_s=WINDOW_S,
            layers_balance=balance.layers,
            devices_balance=balance.devices,
            devices=tuple(
                DeviceStatus(
                    actor_id=device.actor_id,
                    node=device.node,
                    experts=len(reports[device.actor_id].experts),
                    tokens_per_s=load.tokens_per_s if load else 0.0,
                    busy=load.busy if load else 0.0,
                    wait_s=load.wait_s if load else 0.0,
                )
                for device in living
                for load in [loads.get(device.actor_id)]
            ),
            experts=tuple(
                ExpertLoad(*key, tokens_per_s=rates.get(key, 0.0), actors=actors)
                for key, actors in placement.holders.items()
            ),
            rebalances=tuple(self._reports),
        )


def _moves(plan: Plan) -> list[Move]:
    """Return what a plan changes, expert by expert, what comes before what goes."""
    moves = [
        Move(actor_id, *key, is_added=is_added)
        for by_actor, is_added in ((plan.added, True), (plan.dropped, False))
        for actor_id, keys in by_actor.items()
        for key in keys
    ]
    return sorted(moves, key=lambda m: (m.model, m.layer, m.expert, not m.is_added, m.actor_id))
