"""More and fewer actors, and copies of an expert, while requests run: by load or by command.

More: actors join the fleet, Ray is asked for their devices, and once they are up experts are spread
over them too. Fewer: a committed change moves an actor's experts to others, and then it ends. What
fails leaves an actor with a part of its experts, and in the fleet. Actors on a node that Ray is
about to take away get successors elsewhere first, and are emptied in the same way. Where a pool
has some stand by, those are taken first, and others are started in their place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence

from cluster.controller.changes import Changes
from cluster.controller.fleet import Fleet
from cluster.controller.pool import kind_of
from cluster.controller.rebalance import Rebalancer, Spread
from cluster.controller.standby import Standby
from cluster.controller.state import Cluster
from cluster.errors import ExpertMeshError, InvalidRequestError
from cluster.placement.board import Device
from cluster.placement.change import Change
from cluster.placement.drain import change_of_copies, cheapest_to_drain
from cluster.placement.scaling import RECENT_S, SIGNAL_S, BusyMeter, ScalingPolicy, Wanted
from cluster.reports import ChangeReport, Move
from cluster.spec import ExpertKey, ModelExperts

LOOK_S = 0.25
CHANGE_S = 1.0
"""What it takes to empty actors and end them, where others have what they hold."""
DRAINING_CHECK_S = 1.0
UP_TIMEOUT_S = 60.0
"""How long a change waits for actors that it asked for; they may still come later."""
SUCCESSOR_TIMEOUT_S = 10.0
"""The same where their predecessors' node is about to go, perhaps in half a minute."""
FILL_AGAIN_S = 1.0
KEPT_REPORTS = 64
MOST_ACTORS = 1000
NODE_PREFIX = 6
ASKED = "asked for"

logger = logging.getLogger("expertmesh.scaling")


class Elastic:
    """Changes the fleet of one application, one change at a time."""

    def __init__(
        self,
        models: Sequence[ModelExperts],
        fleet: Fleet,
        min_copies: int,
        cluster: Cluster,
        changes: Changes,
        rebalancer: Rebalancer,
    ) -> None:
        """Nothing has changed yet."""
        self.meter = BusyMeter()
        self.history: deque[ChangeReport] = deque(maxlen=KEPT_REPORTS)
        """What was changed, or would have been, the newest first."""
        self._expert_bytes = {model.model: model.expert_bytes for model in models}
        self._fleet = fleet
        self._min_copies = min_copies
        self._cluster = cluster
        self._changes = changes
        self._rebalancer = rebalancer
        self._standby = Standby(fleet, cluster, changes)
        self._one_at_a_time = asyncio.Lock()
        self._policies = {
            name: ScalingPolicy(pool.autoscaling, SIGNAL_S + LOOK_S + CHANGE_S)
            for name, pool in fleet.pools.items()
            if pool.autoscaling is not None
        }
        self._planned: dict[str, int] = {}
        """What each pool that only tells would have gone to last."""
        self._filled: set[tuple[str, int]] = set()
        """Generations of empty actors over which experts were spread, or are being spread."""
        self._fill_from_s = 0.0
        self._awaited: set[str] = set()
        """New actors that a change waits for."""
        self._succeeded: set[str] = set()
        """Actors that are to go with their node and have a successor."""

    @property
    def follows_load(self) -> bool:
        """Whether the number of actors of any pool follows its load."""
        return bool(self._policies)

    # What operators ask for.

    async def scale(
        self, number: int, pool: str = "", dry_run: bool = False, reason: str = ASKED
    ) -> ChangeReport:
        """Have a pool of ``number`` actors; returns when experts are spread over them.

        Raises :class:`InvalidRequestError` where the number is out of bounds or its devices cannot
        hold all experts, :class:`UnavailableError` where another actor is away.
        """
        async with self._one_at_a_time:
            name = self._fleet.pool_named(pool).name
            before = self._fleet.of(name)
            self._check_number(name, number, len(before))
            what = f"{name}: {len(before)} -> {number} actors"
            if number <= len(before):
                leaving = self._cheapest(before, len(before) - number)
                return await self._shrink(leaving, what, dry_run, reason)
            if dry_run:
                return await self._plan_growth(name, number - len(before), what, reason)
            logger.info("%s, %s", what, reason)
            added = self._begin([name] * (number - len(before)))
        # Others go on meanwhile: it may take Ray's autoscaler minutes to find them devices.
        return await self._use(added, what, reason)

    async def drain(self, target: str, dry_run: bool = False, reason: str = ASKED) -> ChangeReport:
        """Empty and end an actor, or all of a node that its id or the beginning of it names.

        Raises what :meth:`scale` raises, also where a pool would fall below its bounds.
        """
        async with self._one_at_a_time:
            leaving = self._named(target)
            for name in {self._fleet.pool_of[actor_id] for actor_id in leaving}:
                actors = self._fleet.of(name)
                left = len(actors) - len(set(actors) & set(leaving))
                self._check_number(name, left, len(actors))
            return await self._shrink(leaving, f"drain {target}", dry_run, reason)

    async def set_copies(
        self, key: ExpertKey, number: int, dry_run: bool = False, reason: str = ASKED
    ) -> ChangeReport:
        """Bring an expert to so many copies, which stay until a rebalancing finds others better.

        Raises :class:`InvalidRequestError` where there is no such expert, or the number is below
        ``min_copies`` or beyond what has room.
        """
        async with self._one_at_a_time, self._rebalancer.one_at_a_time:
            began_s = time.monotonic()
            if key not in self._cluster.placement.holders:
                raise InvalidRequestError(
                    f"no model {key.model!r:.80} with expert {key.expert_id} in layer "
                    f"{key.layer_id}",
                    "expert",
                )
            devices = self._rebalancer.devices(is_any_room=True)
            if not self._min_copies <= number <= len(devices):
                raise InvalidRequestError(
                    f"must be from {self._min_copies} to {len(devices)} (given: {number})", "copies"
                )
            loads = self._rebalancer.tracker.devices(began_s)
            change = change_of_copies(
                key,
                number,
                devices,
                self._changes.shares,
                self._rebalancer.free_bytes(devices),
                self._expert_bytes[key.model],
                {actor_id: load.tokens_per_s for actor_id, load in loads.items()},
            )
            outcome = await self._applied(change, dry_run)
            moves = () if outcome.startswith("failed") else _moves_of(change)
            spread = Spread(outcome, moves, self._rebalancer.bytes_of(moves))
            what = f"{key.model} layer {key.layer_id} expert {key.expert_id}: {number} copies"
            if outcome == "committed":
                self._rebalancer.keep_cold()
            return self._report(what, reason, spread, (), (), began_s)

    async def _applied(self, change: Change, dry_run: bool) -> str:
        if not change.touched():
            return "unchanged"
        if dry_run:
            return "planned"
        try:
            await self._changes.apply(change)
        except ExpertMeshError as error:
            return f"failed: {error}"
        return "committed"

    def _check_number(self, pool: str, number: int, before: int) -> None:
        """Raise :class:`InvalidRequestError` where a pool may not have so many actors."""
        targets = self._fleet.pools[pool].autoscaling
        least, most = 0, MOST_ACTORS
        if targets is not None:
            least, most = targets.min_actors, targets.max_actors
        others = len(self._fleet.in_use()) - before
        least = max(least, self._min_copies - others, 1 - others)
        if not least <= number <= most:
            raise InvalidRequestError(
                f"{pool} must have from {least} to {most} actors (given: {number})", "actors"
            )

    def _named(self, target: str) -> list[str]:
        if target in self._fleet.specs:
            return [target]
        nodes = {actor_id: self._cluster.node_of(actor_id) or "" for actor_id in self._fleet.specs}
        found = {node for node in nodes.values() if node.startswith(target)}
        if len(target) < NODE_PREFIX or len(found) != 1:
            raise InvalidRequestError(
                f"{target!r:.80} is no actor, and not the beginning ({NODE_PREFIX} characters or "
                f"more) of the id of one node that has some; actors: {', '.join(nodes)}",
                "target",
            )
        return [actor_id for actor_id, node in nodes.items() if node in found]

    def _cheapest(self, actors: Sequence[str], number: int) -> list[str]:
        loads = self._rebalancer.tracker.devices(time.monotonic())
        rates = {actor_id: load.tokens_per_s for actor_id, load in loads.items()}
        shares = self._changes.shares
        return cheapest_to_drain(
            actors, number, shares, self._expert_bytes, self._min_copies, rates
        )

    # Growing and shrinking.

    async def _plan_growth(self, pool: str, number: int, what: str, reason: str) -> ChangeReport:
        began_s = time.monotonic()
        room_bytes = self._rebalancer.room_bytes(pool)
        coming = [Device(f"{pool}-new-{i}", f"new-{i}", room_bytes) for i in range(number)]
        async with self._rebalancer.one_at_a_time:
            spread = await self._rebalancer.spread(coming=coming, dry_run=True)
        added = [device.actor_id for device in coming]
        return self._report(what, reason, spread, added, (), began_s)

    async def _use(self, added: Sequence[str], what: str, reason: str) -> ChangeReport:
        """Spread experts over actors that were asked for, those that come up in time."""
        began_s = time.monotonic()
        self._awaited |= set(added)
        try:
            await self._wait_up(added, UP_TIMEOUT_S)
            async with self._one_at_a_time:
                up = [a for a in added if a in self._cluster.placement.generations]
                spread = await self._fill(up) if up else Spread("committed", (), 0)
        finally:
            self._awaited -= set(added)
        away = [a for a in added if a not in up and a in self._fleet.specs]
        if away and spread.outcome == "committed":
            why = await asyncio.to_thread(self._cluster.pool.shortage, away[0])
            spread = Spread(f"pending: {', '.join(away)}: {why}", spread.moves, spread.moved_bytes)
        return self._report(what, reason, spread, added, (), began_s)

    def _begin(self, pools: Sequence[str], apart_from: Collection[str] = ()) -> list[str]:
        """Let an actor join each of the pools, as often as it is named.

        That is one that stands by, on none of the nodes ``apart_from``; without any Ray is asked.
        """
        return [self._standby.take(pool, apart_from) or self._standby.start(pool) for pool in pools]

    async def _wait_up(self, actor_ids: Sequence[str], timeout_s: float) -> list[str]:
        """Return which of the actors are up, after all are or the time is over."""
        wanted = set(actor_ids)
        try:
            async with asyncio.timeout(timeout_s):
                await self._cluster.wait_for(lambda now: wanted <= now.generations.keys())
        except TimeoutError:
            pass
        return [a for a in actor_ids if a in self._cluster.placement.generations]

    async def _fill(self, empty: Sequence[str]) -> Spread:
        """Spread experts over actors that are up and have none; where that fails, later again."""
        generations = self._cluster.placement.generations
        filled = {(actor_id, generations[actor_id]) for actor_id in empty}
        self._filled |= filled
        try:
            async with self._rebalancer.one_at_a_time:
                spread = await self._rebalancer.spread()
        except ExpertMeshError as error:
            spread = Spread(f"failed: {error}", (), 0)
        if spread.outcome != "committed":
            self._filled -= filled
            self._fill_from_s = time.monotonic() + FILL_AGAIN_S
        self.meter.restart()
        return spread

    async def _shrink(
        self, leaving: Sequence[str], what: str, dry_run: bool, reason: str
    ) -> ChangeReport:
        began_s = time.monotonic()
        if not leaving:
            return self._report(what, reason, Spread("unchanged", (), 0), (), (), began_s)
        if not dry_run:
            logger.info("%s, %s: %s to go", what, reason, ", ".join(leaving))
        async with self._rebalancer.one_at_a_time:
            spread = await self._rebalancer.spread(leaving, dry_run=dry_run)
            removed = [] if spread.outcome.startswith("failed") else list(leaving)
            for actor_id in removed if spread.outcome == "committed" else ():
                self.meter.leave(actor_id, self._fleet.pool_of[actor_id])
                await self._cluster.end(actor_id)
        return self._report(what, reason, spread, (), removed, began_s)

    def _report(
        self,
        what: str,
        reason: str,
        spread: Spread,
        added: Sequence[str],
        removed: Sequence[str],
        began_s: float,
    ) -> ChangeReport:
        placement = self._cluster.placement
        report = ChangeReport(
            what=what,
            reason=reason,
            outcome=spread.outcome,
            added=tuple(added),
            removed=tuple(removed),
            moves=tuple(spread.moves),
            moved_bytes=spread.moved_bytes,
            at_s=time.time(),
            took_s=time.monotonic() - began_s,
            epoch=placement.epoch,
            version=placement.version,
        )
        logger.info("%s, %s: %s after %.1f s", what, reason, report.outcome, report.took_s)
        if report.outcome not in ("planned", "unchanged"):
            self.history.appendleft(report)
        return report

    # What happens by itself.

    async def run_forever(self) -> None:
        """Follow the load, use actors that have come up, and leave nodes that are about to go."""
        await asyncio.gather(
            _forever(self._follow_load, LOOK_S),
            _forever(self._fill_empty, LOOK_S),
            _forever(self._keep_standby, LOOK_S),
            _forever(self._leave_nodes, DRAINING_CHECK_S),
        )

    async def _follow_load(self) -> None:
        for pool, policy in self._policies.items():
            actors = self._fleet.of(pool)
            living = [a for a in actors if a in self._cluster.placement.generations]
            signals = self.meter.signals(living, SIGNAL_S, pool) if living else None
            recent = self.meter.signals(living, RECENT_S, pool) if living else None
            wanted = policy.decide(len(actors), signals, time.monotonic(), recent)
            if wanted is None:
                continue
            if policy.targets.dry_run:
                self._tell(pool, len(actors), wanted)
            else:
                await self._follow(pool, wanted)

    async def _follow(self, pool: str, wanted: Wanted) -> None:
        before = len(self._fleet.of(pool))
        try:
            await self.scale(wanted.actors, pool, reason=wanted.reason)
        except ExpertMeshError as error:
            what = f"{pool}: {before} -> {wanted.actors} actors"
            spread = Spread(f"failed: {error}", (), 0)
            self._report(what, wanted.reason, spread, (), (), time.monotonic())

    def _tell(self, pool: str, before: int, wanted: Wanted) -> None:
        """Report what a pool would do, once as long as that is the same."""
        if self._planned.get(pool) == wanted.actors:
            return
        self._planned[pool] = wanted.actors
        what = f"{pool}: {before} -> {wanted.actors} actors"
        report = self._report(
            what, wanted.reason, Spread("planned", (), 0), (), (), time.monotonic()
        )
        self.history.appendleft(report)

    async def _fill_empty(self) -> None:
        """Use actors that came up after what asked for them had stopped waiting."""
        generations = self._cluster.placement.generations
        empty = [
            actor_id
            for actor_id, share in self._changes.shares.items()
            if not share
            and actor_id in generations
            and actor_id not in self._awaited
            and actor_id not in self._fleet.standby
            and (actor_id, generations[actor_id]) not in self._filled
        ]
        began_s = time.monotonic()
        if not empty or self._one_at_a_time.locked() or began_s < self._fill_from_s:
            return
        async with self._one_at_a_time:
            spread = await self._fill(empty)
            if spread.outcome == "committed":
                what = f"{', '.join(empty)} came up"
                self._report(what, "waited for", spread, empty, (), began_s)

    async def _keep_standby(self) -> None:
        """Have as many actors stand by as each pool wants, once all experts are there."""
        if self._one_at_a_time.locked() or self._cluster.placement.missing():
            return
        async with self._one_at_a_time:
            await self._standby.keep()

    async def _leave_nodes(self) -> None:
        """Empty actors whose node Ray is about to take away, after asking for successors."""
        draining = await asyncio.to_thread(self._cluster.pool.draining)
        self._succeeded &= self._fleet.specs.keys()
        leaving = [
            actor_id
            for actor_id in self._fleet.specs
            if self._cluster.node_of(actor_id) in draining or actor_id in self._succeeded
        ]
        if not leaving:
            return
        async with self._one_at_a_time:
            leaving = [actor_id for actor_id in leaving if actor_id in self._fleet.specs]
            # Who stands by there ends, and another one is started elsewhere in time.
            has_one = self._succeeded | self._fleet.standby
            without = [actor_id for actor_id in leaving if actor_id not in has_one]
            began_s = time.monotonic()
            pools = [self._fleet.pool_of[actor_id] for actor_id in without]
            added = self._begin(pools, draining)
            self._succeeded |= set(without)
            up = await self._wait_up(added, SUCCESSOR_TIMEOUT_S)
            generations = self._cluster.placement.generations
            self._filled |= {(a, generations[a]) for a in up if a in generations}
            what = f"{', '.join(leaving)} to go with their node"
            report = await self._shrink(leaving, what, False, "Ray drains it")
            if added:
                logger.info("%s took over after %.1f s", ", ".join(up), time.monotonic() - began_s)
            if report.outcome == "committed":
                self._succeeded -= set(leaving)


async def _forever(look: Callable[[], Awaitable[None]], period_s: float) -> None:
    while True:
        await asyncio.sleep(period_s)
        try:
            await look()
        except ExpertMeshError as error:
            logger.info("not scaled: %s", error)
        except Exception as error:  # Ray's own is away for a moment
            logger.warning("not scaled (%s)", kind_of(error), exc_info=True)


def _moves_of(change: Change) -> tuple[Move, ...]:
    return tuple(
        Move(actor_id, *key, is_added=is_added)
        for by_actor, is_added in ((change.added, True), (change.dropped, False))
        for actor_id, keys in by_actor.items()
        for key in keys
    )
