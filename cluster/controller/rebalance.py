"""Rebalancing: load as it is reported, a plan for it, and the changes that bring it about."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.controller.changes import Changes
from cluster.controller.fleet import Fleet
from cluster.controller.state import Cluster
from cluster.errors import ConfigError, ExpertMeshError, InvalidRequestError, UnavailableError
from cluster.placement.balance import (
    IDLE_SHARE,
    Balance,
    Plan,
    balance_of,
    plan_copies,
    plan_without_cold,
)
from cluster.placement.board import Device
from cluster.placement.change import batches
from cluster.placement.load import FALL_S, WINDOW_S, LoadTracker
from cluster.reports import DeviceStatus, ExpertLoad, LoadStatus, Move, RebalanceReport
from cluster.spec import ExpertKey, ModelExperts

IDLE_TOKENS_PER_S = 0.01
"""An expert with fewer on average is idle, and its rate is what fades of an earlier load."""
WORTH_GAIN = 0.05
"""By itself the controller moves nothing for less than this off the busiest device's load, in mean
devices' loads; measured loads waver by some percent."""
KEPT_REPORTS = 16
LOGGED_MOVES = 20

logger = logging.getLogger("expertmesh.rebalance")


@dataclass(frozen=True, slots=True)
class Spread:
    """What a spreading did: its outcome as in a :class:`ChangeReport`, and what moved."""

    outcome: str
    moves: tuple[Move, ...]
    moved_bytes: int


class Rebalancer:
    """Keeps the load of one application's experts, and spreads it when asked to."""

    def __init__(
        self,
        models: Sequence[ModelExperts],
        fleet: Fleet,
        min_copies: int,
        cluster: Cluster,
        changes: Changes,
    ) -> None:
        """Without budgets nobody knows what a device has room for.

        Then no expert gets more than ``min_copies``, and no device more than the fullest one has.
        """
        autoscaled = [pool.autoscaling for pool in fleet.pools.values() if pool.autoscaling]
        fall_s = min((targets.downscale_delay_s for targets in autoscaled), default=FALL_S)
        self.tracker = LoadTracker(time.monotonic(), fall_s)
        self._models = models
        self._expert_bytes = {model.model: model.expert_bytes for model in models}
        self._fleet = fleet
        self._min_copies = min_copies
        self._cluster = cluster
        self._changes = changes
        self.one_at_a_time = asyncio.Lock()
        """Held by whoever makes a plan, until it is carried out."""
        self._reports: deque[RebalanceReport] = deque(maxlen=KEPT_REPORTS)
        self.keep_cold()

    def keep_cold(self) -> None:
        """Have no copy go by itself for being cold until the load from now on is known for long."""
        self._cold_from_s = time.monotonic() + self.tracker.fall_s

    async def run_forever(self, period_s: float) -> None:
        """Rebalance again and again where that is worth it; why it is not is told once."""
        told = ""
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.rebalance(least_gain=WORTH_GAIN)
                told = ""
            except ExpertMeshError as error:
                if str(error) != told:
                    told = str(error)
                    logger.info("not rebalanced: %s", told)
            except Exception:
                logger.exception("unexpected failure; trying again")

    async def rebalance(self, dry_run: bool = False, least_gain: float = 0.0) -> RebalanceReport:
        """Spread the load of now; returns when that is done, or at once with what would be.

        A plan that takes less than ``least_gain`` off the busiest device's load is not carried out;
        then only copies go that were hardly asked for since long. Raises :class:`UnavailableError`
        while an expert has fewer copies than it is to have. Where a change fails, those before it
        stay, which is told in the report.
        """
        async with self.one_at_a_time:
            began_s = time.monotonic()
            devices = self.devices()
            rates = self.tracker.tokens_per_s(began_s)
            held = {device.actor_id: self._changes.shares[device.actor_id] for device in devices}
            most = self._min_copies if self._fleet.budgets_bytes is None else None
            plan = await asyncio.to_thread(
                plan_copies, self._models, devices, rates, held, self._min_copies, most
            )
            is_worth = plan.gain >= least_gain and bool(plan.added or plan.dropped)
            if not is_worth and began_s >= self._cold_from_s:
                told = {} if self._mean_rate(rates) < IDLE_TOKENS_PER_S else rates
                plan = await asyncio.to_thread(
                    plan_without_cold, self._models, devices, told, held, self._min_copies
                )
                is_worth = bool(plan.dropped)
            if not is_worth:
                return self._report("balanced", plan, (), 0, plan.before, began_s)
            moves = _moves(plan.added, plan.dropped)
            self._explain(plan, moves, rates, dry_run)
            if dry_run:
                return self._report("planned", plan, moves, plan.moved_bytes, plan.after, began_s)
            outcome = await self._carry_out(plan.added, plan.dropped, self.free_bytes(devices))
            done = [move for move in moves if self._is_done(move)]
            report = self._report(
                outcome,
                plan,
                done,
                self.bytes_of(done),
                balance_of(self._models, devices, rates, self._changes.shares),
                began_s,
            )
            logger.info("rebalancing is %s after %.1f s", outcome, report.took_s)
            self._reports.appendleft(report)
            return report

    async def spread(
        self,
        leaving: Collection[str] = (),
        coming: Sequence[Device] = (),
        dry_run: bool = False,
    ) -> Spread:
        """Spread all experts over the devices but those of actors that are ``leaving``.

        Those get nothing, and hold nothing afterwards. ``coming`` devices are only for a dry run.
        For the caller that holds :attr:`one_at_a_time`. An expert that nobody asks for counts a
        little, so that new devices are used before there is load. Raises
        :class:`UnavailableError` as :meth:`rebalance` does, and :class:`InvalidRequestError` where
        experts do not fit.
        """
        shares = self._changes.shares
        devices = [*self.devices(leaving), *coming]
        rates, is_idle = self._rates_of_all()
        held = {device.actor_id: shares.get(device.actor_id, ()) for device in devices}
        most = self._min_copies if self._fleet.budgets_bytes is None or is_idle else None
        try:
            plan = await asyncio.to_thread(
                plan_copies, self._models, devices, rates, held, self._min_copies, most
            )
        except ConfigError as error:
            raise InvalidRequestError(f"refused: {error.message}", "actors") from None
        dropped = {**plan.dropped, **{a: tuple(shares[a]) for a in leaving if shares.get(a)}}
        moves = _moves(plan.added, dropped)
        if dry_run:
            return Spread("planned", tuple(moves), plan.moved_bytes)
        free_bytes = self.free_bytes(devices) | dict.fromkeys(leaving, 0.0)
        outcome = await self._carry_out(plan.added, dropped, free_bytes)
        done = [move for move in moves if self._is_done(move)]
        return Spread(outcome, tuple(done), self.bytes_of(done))

    def _rates_of_all(self) -> tuple[dict[ExpertKey, float], bool]:
        """Return a rate above zero for each expert, and whether nothing is asked for at all."""
        told = self.tracker.tokens_per_s(time.monotonic())
        keys = [key for model in self._models for key in model.expert_keys()]
        mean = self._mean_rate(told)
        is_idle = mean < IDLE_TOKENS_PER_S
        least = 1.0 if is_idle else IDLE_SHARE * mean
        return {key: max(0.0 if is_idle else told.get(key, 0.0), least) for key in keys}, is_idle

    def _mean_rate(self, told: Mapping[ExpertKey, float]) -> float:
        return sum(told.values()) / sum(len(model.expert_keys()) for model in self._models)

    def free_bytes(self, devices: Sequence[Device]) -> dict[str, float]:
        """Return the room that each device's actor has beside what it holds."""
        shares = self._changes.shares
        return {
            device.actor_id: device.room_bytes
            - sum(self._expert_bytes[key.model] for key in shares.get(device.actor_id, ()))
            for device in devices
        }

    def bytes_of(self, moves: Sequence[Move]) -> int:
        """Return what had to be loaded for these moves."""
        return sum(self._expert_bytes[move.model] for move in moves if move.is_added)

    async def _carry_out(
        self,
        added: Mapping[str, Sequence[ExpertKey]],
        dropped: Mapping[str, Sequence[ExpertKey]],
        free_bytes: Mapping[str, float],
    ) -> str:
        try:
            for change in batches(added, dropped, free_bytes, self._expert_bytes):
                await self._changes.apply(change)
        except ExpertMeshError as error:
            return f"failed: {error}"
        return "committed"

    def _is_done(self, move: Move) -> bool:
        key = ExpertKey(move.model, move.layer, move.expert)
        return (key in self._changes.shares[move.actor_id]) == move.is_added

    def devices(self, leaving: Collection[str] = (), is_any_room: bool = False) -> list[Device]:
        """Return the devices that may hold experts: of actors that live and are not ``leaving``.

        Where some are, or with ``is_any_room``, devices without a budget have room for anything.
        Raises :class:`UnavailableError` while another that is to hold some is away, or copies are
        missing. Who was to hold nothing and has not come up yet, or stands by, is left out.
        """
        placement, shares = self._cluster.placement, self._changes.shares
        away = [a for a in shares if a not in placement.generations]
        missing = [a for a in away if shares[a] and a not in leaving]
        is_short = placement.fewest_copies() < self._min_copies
        if missing or (is_short and not set(away) & set(leaving)):
            who = f"while {', '.join(missing)} is away" if missing else "while copies are missing"
            raise UnavailableError(f"copies are not moved {who}", "", 1.0)
        speeds = self.tracker.speeds(self._fleet.pool_of, time.monotonic())
        usual = sum(speeds.values()) / len(speeds) if speeds else 1.0
        return [
            Device(
                actor_id,
                self._cluster.node_of(actor_id) or actor_id,
                self.room_bytes(self._fleet.pool_of[actor_id], is_any_room or bool(leaving)),
                speeds.get(actor_id, usual),
            )
            for actor_id in shares
            if actor_id not in (*away, *leaving) and actor_id not in self._fleet.standby
        ]

    def room_bytes(self, pool: str, is_any: bool = False) -> float:
        """Return what a device of a pool has room for.

        Without budgets that is what the fullest one has and one expert more, or with ``is_any``
        whatever there is.
        """
        budget_bytes = self._fleet.pools[pool].memory_budget_bytes
        if budget_bytes is not None:
            return budget_bytes
        used = [
            sum(self._expert_bytes[key.model] for key in keys)
            for keys in self._changes.shares.values()
        ]
        largest = max(self._expert_bytes.values())
        return sum(used) + 2 * largest if is_any else max(used) + largest

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
        used = [device for device in living if device.actor_id not in self._fleet.standby]
        if used:
            held = {device.actor_id: reports[device.actor_id].experts for device in used}
            balance = balance_of(self._models, used, rates, held)
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


def _moves(
    added: Mapping[str, Sequence[ExpertKey]], dropped: Mapping[str, Sequence[ExpertKey]]
) -> list[Move]:
    """Return what a plan changes, expert by expert, what comes before what goes."""
    moves = [
        Move(actor_id, *key, is_added=is_added)
        for by_actor, is_added in ((added, True), (dropped, False))
        for actor_id, keys in by_actor.items()
        for key in keys
    ]
    return sorted(moves, key=lambda m: (m.model, m.layer, m.expert, not m.is_added, m.actor_id))
