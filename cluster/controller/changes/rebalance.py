"""Rebalancing: from the reported load to a plan, and to the changes that carry it out."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.controller.health.slow_actors import SlowNotice
from cluster.controller.records.changes import Changes
from cluster.controller.records.state import ClusterState
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
from cluster.placement.load import WINDOW_S, LoadTracker
from cluster.reports import DeviceStatus, ExpertLoad, LoadStatus, Move, RebalanceReport
from cluster.spec import ExpertKey, model_id_of

IDLE_TOKENS_PER_S = 0.01
"""With fewer for each expert on average there is no load: the rates are fading rests."""
WORTH_GAIN = 0.05
"""The least gain for which the controller rebalances automatically, in the mean device's load;
measured loads vary by some percent."""
KEPT_REPORTS = 16
LOGGED_MOVES = 20

logger = logging.getLogger("expertmesh.rebalance")


@dataclass(frozen=True, slots=True)
class Moved:
    """What a plan moved: the outcome as in a :class:`ChangeReport`, the moves and their bytes."""

    outcome: str
    moves: tuple[Move, ...] = ()
    moved_bytes: int = 0


class Rebalancer:
    """Spreads the load of one application's experts over its devices."""

    def __init__(
        self, state: ClusterState, changes: Changes, tracker: LoadTracker, notice: SlowNotice
    ) -> None:
        """``tracker`` knows the load, from the actors' reports; ``notice`` knows slow actors."""
        self.tracker = tracker
        self.plan_lock = asyncio.Lock()
        """Held from the making of a plan until it is carried out."""
        self._state = state
        self._changes = changes
        self._notice = notice
        self._expert_bytes = {model.model: model.expert_bytes for model in state.models}
        self._num_experts = sum(len(model.expert_keys()) for model in state.models)
        self._reports: deque[RebalanceReport] = deque(maxlen=KEPT_REPORTS)
        self.keep_cold_copies()

    def keep_cold_copies(self) -> None:
        """Drop no cold copy automatically until the load from now on has been seen for long."""
        self._cold_at_s = time.monotonic() + self.tracker.fall_s

    async def run_forever(self, period_s: float) -> None:
        """Rebalance every ``period_s`` where the gain is worth it; logs a new reason why not."""
        last_reason = ""
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.rebalance(least_gain=WORTH_GAIN)
                last_reason = ""
            except ExpertMeshError as error:
                if str(error) != last_reason:
                    last_reason = str(error)
                    logger.info("did not rebalance: %s", last_reason)
            except Exception:
                logger.exception("unexpected failure; trying again")

    async def rebalance(self, dry_run: bool = False, least_gain: float = 0.0) -> RebalanceReport:
        """Spread the current load; returns when that is done, or a dry run's plan at once.

        A plan that takes less than ``least_gain`` off the busiest device's load is not carried out.
        Then only copies are dropped that have been cold for long. Raises :class:`UnavailableError`
        while an expert has fewer copies than it is to have. Where a change fails, the changes
        before it stay, and the report says so.
        """
        async with self.plan_lock:
            began_at_s = time.monotonic()
            devices = self.devices()
            rates = self.tracker.tokens_per_s(began_at_s)
            held = {device.actor_id: self._state.shares[device.actor_id] for device in devices}
            models, min_copies = self._state.models, self._state.min_copies
            plan = await asyncio.to_thread(
                plan_copies, models, devices, rates, held, min_copies, self._max_copies()
            )
            is_worth = plan.gain >= least_gain and bool(plan.added or plan.dropped)
            if not is_worth and began_at_s >= self._cold_at_s:
                warm_rates = {} if self._mean_rate(rates) < IDLE_TOKENS_PER_S else rates
                plan = await asyncio.to_thread(
                    plan_without_cold, models, devices, warm_rates, held, min_copies
                )
                is_worth = bool(plan.dropped)
            if not is_worth:
                return self._report(Moved("balanced"), plan.before, plan.before, began_at_s)
            self._explain(plan, rates, dry_run)
            free_bytes = self.free_bytes(devices)
            moved = await self.carry_out(plan.added, plan.dropped, free_bytes, dry_run)
            if dry_run:
                return self._report(moved, plan.before, plan.after, began_at_s)
            after = balance_of(models, devices, rates, self._state.shares)
            report = self._report(moved, plan.before, after, began_at_s)
            logger.info("rebalancing is %s after %.1f s", report.outcome, report.took_s)
            self._reports.appendleft(report)
            return report

    async def spread(
        self,
        leaving: Collection[str] = (),
        coming: Sequence[Device] = (),
        dry_run: bool = False,
    ) -> Moved:
        """Spread all experts over the devices, except those of actors that are ``leaving``.

        Leaving actors hold nothing afterwards. ``coming`` devices are only for a dry run. The
        caller holds :attr:`plan_lock`. An expert without load counts a little, so that new devices
        are used before there is load. Raises :class:`UnavailableError` as :meth:`rebalance` does,
        and :class:`InvalidRequestError` where experts do not fit.
        """
        shares = self._state.shares
        devices = [*self.devices(leaving), *coming]
        rates, is_idle = self._rates_of_all()
        held = {device.actor_id: shares.get(device.actor_id, ()) for device in devices}
        min_copies = self._state.min_copies
        most = min_copies if is_idle else self._max_copies()
        try:
            plan = await asyncio.to_thread(
                plan_copies, self._state.models, devices, rates, held, min_copies, most
            )
        except ConfigError as error:
            raise InvalidRequestError(f"refused: {error.message}", "actors") from None
        dropped = {**plan.dropped, **{a: tuple(shares[a]) for a in leaving if shares.get(a)}}
        free_bytes = self.free_bytes(devices) | dict.fromkeys(leaving, 0.0)
        return await self.carry_out(plan.added, dropped, free_bytes, dry_run)

    async def carry_out(
        self,
        added: Mapping[str, Sequence[ExpertKey]],
        dropped: Mapping[str, Sequence[ExpertKey]],
        free_bytes: Mapping[str, float],
        dry_run: bool = False,
    ) -> Moved:
        """Make the changes of a plan one after the other, up to the first that fails."""
        moves = _moves(added, dropped)
        if dry_run:
            return Moved("planned", moves, self._bytes_of(moves))
        outcome = "committed"
        try:
            for change in batches(added, dropped, free_bytes, self._expert_bytes):
                await self._changes.apply(change)
        except ExpertMeshError as error:
            outcome = f"failed: {error}"
        done = tuple(move for move in moves if self._is_done(move))
        return Moved(outcome, done, self._bytes_of(done))

    def _is_done(self, move: Move) -> bool:
        key = ExpertKey(move.model, move.layer, move.expert)
        return (key in self._state.shares[move.actor_id]) == move.is_added

    def _bytes_of(self, moves: Sequence[Move]) -> int:
        """Return how much has to be loaded for these moves."""
        return sum(self._expert_bytes[move.model] for move in moves if move.is_added)

    def _max_copies(self) -> int | None:
        """Return how many copies an expert may have: without budgets no more than configured."""
        return self._state.min_copies if self._state.fleet.budgets_bytes is None else None

    def _rates_of_all(self) -> tuple[dict[ExpertKey, float], bool]:
        """Return a rate above zero for each expert, and whether there is no load at all."""
        rates = self.tracker.tokens_per_s(time.monotonic())
        keys = [key for model in self._state.models for key in model.expert_keys()]
        mean = self._mean_rate(rates)
        if mean < IDLE_TOKENS_PER_S:
            return dict.fromkeys(keys, 1.0), True
        return {key: max(rates.get(key, 0.0), IDLE_SHARE * mean) for key in keys}, False

    def _mean_rate(self, rates: Mapping[ExpertKey, float]) -> float:
        return sum(rates.values()) / self._num_experts

    def free_bytes(self, devices: Sequence[Device]) -> dict[str, float]:
        """Return the room that each device has beside its actor's share."""
        shares = self._state.shares
        return {
            device.actor_id: device.room_bytes - self._share_bytes(shares.get(device.actor_id, ()))
            for device in devices
        }

    def _share_bytes(self, keys: Sequence[ExpertKey]) -> int:
        return sum(self._expert_bytes[key.model] for key in keys)

    def devices(self, leaving: Collection[str] = (), is_any_room: bool = False) -> list[Device]:
        """Return the devices of the living actors in use, except those that are ``leaving``.

        The devices of a pool are equally fast, but for slow actors. Where actors leave, or with
        ``is_any_room``, devices without a budget have room for anything. Retained experts of an
        earlier deployment take a part of a budget. Actors that are to hold nothing and have not
        come up yet are left out. Raises :class:`UnavailableError` while any other actor is away, or
        copies are missing.
        """
        placement, shares, fleet = self._state.placement, self._state.shares, self._state.fleet
        away = [a for a in shares if a not in placement.generations]
        missing = [a for a in away if shares[a] and a not in leaving]
        is_short = placement.fewest_copies(self._state.keys) < self._state.min_copies
        if missing or (is_short and not set(away) & set(leaving)):
            who = f"while {', '.join(missing)} is away" if missing else "while copies are missing"
            raise UnavailableError(f"copies are not moved {who}", "", 1.0)
        speeds = self.tracker.speeds(fleet.pool_of, time.monotonic())
        mean_speed = sum(speeds.values()) / len(speeds) if speeds else 1.0
        return [
            Device(
                actor_id,
                self._state.nodes.get(actor_id, actor_id),
                self.room_bytes(fleet.pool_of[actor_id], is_any_room or bool(leaving))
                - self._state.retained_bytes(actor_id),
                speeds.get(actor_id, mean_speed) / self._notice.slow.get(actor_id, 1.0),
            )
            for actor_id in shares
            if actor_id not in (*away, *leaving) and actor_id not in fleet.standby
        ]

    def room_bytes(self, pool: str, is_any: bool = False) -> float:
        """Return how many bytes of experts a device of a pool has room for.

        Without budgets that is what the fullest device holds and one expert more, and an equal part
        of what slow actors hold; with ``is_any`` it is more than there is.
        """
        budget_bytes = self._state.fleet.pools[pool].memory_budget_bytes
        if budget_bytes is not None:
            return budget_bytes
        used = [self._share_bytes(keys) for keys in self._state.shares.values()]
        largest = max(self._expert_bytes.values())
        if is_any:
            return sum(used) + 2 * largest
        slow = [actor_id for actor_id in self._notice.slow if actor_id in self._state.shares]
        slow_bytes = sum(self._share_bytes(self._state.shares[actor_id]) for actor_id in slow)
        part = math.ceil(slow_bytes / max(1, len(used) - len(slow)) / largest)
        return max(used) + (1 + part) * largest

    def _explain(self, plan: Plan, rates: Mapping[ExpertKey, float], dry_run: bool) -> None:
        moves = _moves(plan.added, plan.dropped)
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
                model_id_of(key.model),
                *key[1:],
                rates.get(key, 0.0),
                "a copy comes to" if move.is_added else "its copy goes from",
                move.actor_id,
                len(plan.holders[key]),
            )

    def _report(
        self, moved: Moved, before: Balance, after: Balance, began_at_s: float
    ) -> RebalanceReport:
        placement = self._state.placement
        return RebalanceReport(
            outcome=moved.outcome,
            moves=moved.moves,
            moved_bytes=moved.moved_bytes,
            layers_before=before.layers,
            layers_after=after.layers,
            devices_before=before.devices,
            devices_after=after.devices,
            at_s=time.time(),
            took_s=time.monotonic() - began_at_s,
            epoch=placement.epoch,
            version=placement.version,
        )

    def load(self) -> LoadStatus:
        """Return the load of every expert and device, and the last reports."""
        now_s = time.monotonic()
        rates, loads = self.tracker.tokens_per_s(now_s), self.tracker.devices(now_s)
        placement, reports = self._state.placement, self._state.reports
        living = [
            Device(actor_id, reports[actor_id].node, 0.0)
            for actor_id in sorted(reports)
            if actor_id in placement.generations
        ]
        balance = Balance(1.0, 1.0)
        used = [device for device in living if device.actor_id not in self._state.fleet.standby]
        if used:
            held = {device.actor_id: reports[device.actor_id].experts for device in used}
            balance = balance_of(self._state.models, used, rates, held)
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
                ExpertLoad(
                    model_id_of(key.model),
                    *key[1:],
                    tokens_per_s=rates.get(key, 0.0),
                    actors=actors,
                )
                for key, actors in placement.holders.items()
                if key.model in self._state.keys
            ),
            rebalances=tuple(self._reports),
        )


def _moves(
    added: Mapping[str, Sequence[ExpertKey]], dropped: Mapping[str, Sequence[ExpertKey]]
) -> tuple[Move, ...]:
    """Return the moves of a plan, expert by expert, added copies before dropped ones."""
    moves = [
        Move(actor_id, *key, is_added=is_added)
        for by_actor, is_added in ((added, True), (dropped, False))
        for actor_id, keys in by_actor.items()
        for key in keys
    ]
    return tuple(
        sorted(moves, key=lambda m: (m.model, m.layer, m.expert, not m.is_added, m.actor_id))
    )
