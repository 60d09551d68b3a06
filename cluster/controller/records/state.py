"""The state of the cluster: the published placement, and what is known of each actor."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from ray.actor import ActorHandle

from cluster.controller.records.adopt import Adopted
from cluster.controller.records.fleet import Fleet
from cluster.controller.records.kernels import ExpertKernels
from cluster.controller.records.ledger import Ledger, LedgerStore
from cluster.controller.records.pool import kind_of
from cluster.errors import StaleEpochError
from cluster.placement.change import Change, Shares, with_change
from cluster.placement.placement import Placement, assign_experts, empty_placement
from cluster.placement.retained import experts_bytes, fits_beside
from cluster.spec import ActorReport, ExpertKey, ModelExperts

LEDGER_TIMEOUT_S = 2.0
"""How long a look at the ledger may take before a kill."""

logger = logging.getLogger("expertmesh.controller")


class ClusterState:
    """The placement and the actors of one application, changed on one event loop.

    ``placement`` changes only through :meth:`publish`, which wakes every :meth:`wait_for`. Of each
    actor there are: in ``shares`` the experts that it is to hold, in ``nodes`` the node that it
    runs on or ran on last; and while it serves, in ``handles`` its handle and in ``reports`` its
    last report. ``is_deleted`` says that Serve deletes the application.

    ``retained`` are models of an earlier deployment, by key: they stay in the placement for routers
    that still serve them. ``withdrawn`` are the experts, by actor, that have left it for lack of
    memory and are in their actors' memory still.

    ``unheard`` has the generations of actors that did not answer when this controller started, and
    whose experts it does not know. ``asked_at_s`` is when it last asked routers which actors they
    hear. ``is_superseded`` says that a newer controller runs: this one gives no orders.
    """

    def __init__(
        self,
        models: Sequence[ModelExperts],
        fleet: Fleet,
        min_copies: int,
        ledger: LedgerStore,
    ) -> None:
        """Begin without actors; raises :class:`ConfigError` where the fleet cannot hold all."""
        self.models, self.fleet, self.min_copies = tuple(models), fleet, min_copies
        self.keys = frozenset(model.model for model in self.models)
        self.retained: dict[str, ModelExperts] = {}
        self.withdrawn: dict[str, list[ExpertKey]] = {}
        self.placement = empty_placement(0, self.models)
        self.shares: Shares = {}
        self.nodes: dict[str, str] = {}
        self.handles: dict[str, ActorHandle] = {}
        self.reports: dict[str, ActorReport] = {}
        self.kernels = ExpertKernels()
        self.is_deleted = False
        self.is_superseded = False
        self.unheard: dict[str, int] = {}
        self.asked_at_s = -math.inf
        self.on_superseded: Callable[[], None] = lambda: None
        """Called once, when a newer controller has claimed the ledger."""
        self._generations: defaultdict[str, int] = defaultdict(int)
        """The last generation of every actor, also of those that left the fleet."""
        self._ledger = ledger
        self._recording = asyncio.Lock()
        self._checking: asyncio.Task[None] | None = None
        self._held_in: Placement | None = None
        self._held: dict[str, list[ExpertKey]] = {}
        self._changed = asyncio.Condition()
        self.assign()

    # The placement.

    async def publish(self, change: Callable[[Placement], Placement]) -> None:
        """Publish ``change(placement)``; nothing if it raises."""
        async with self._changed:
            # Computed under the lock: concurrent changes must not undo each other.
            placement = self._without_broken(change(self.placement))
            is_complete = self.placement.missing() and not placement.missing()
            self.placement = placement
            self._changed.notify_all()
        if is_complete:
            logger.info(
                "all %d experts have a live copy (epoch %d, placement %d)",
                len(placement.holders),
                *placement.order,
            )

    def _without_broken(self, placement: Placement) -> Placement:
        """Take retained models with a lost expert out: nobody can load it any more."""
        broken = {key.model for key in placement.missing()} & self.retained.keys()
        if not broken:
            return placement
        for model in broken:
            logger.warning("ending the previous model %s: one of its experts is lost", model)
            del self.retained[model]
        return placement.without_models(broken)

    async def release(self, models: Iterable[str]) -> None:
        """Take retained models out of the placement; actors unload their experts later."""
        gone = set(models)
        for model in gone:
            del self.retained[model]
        await self.publish(lambda placement: placement.without_models(gone))

    def retained_bytes(self, actor_id: str) -> int:
        """Return the part of a living actor's budget that experts of the retained models take."""
        report = self.reports.get(actor_id)
        if report is None or self.fleet.budgets_bytes is None:
            return 0
        return experts_bytes(report.experts, self.retained)

    def is_complete(self) -> bool:
        """Return whether each expert of the deployment's own models has a live copy."""
        return not any(key.model in self.keys for key in self.placement.missing())

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds; it is checked after each change of the placement."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def mark_deleted(self) -> None:
        """Note that Serve deletes the application, and wake all who wait."""
        async with self._changed:
            self.is_deleted = True
            self._changed.notify_all()

    def assign(self) -> None:
        """Decide what each actor is to hold; actors in the placement keep what they hold.

        Where the fleet has a new actor, all experts are dealt out anew, so that it gets a share.
        """
        actor_ids, budgets_bytes = self.fleet.in_use(), self.fleet.budgets_bytes
        is_same_fleet = all(self._generations.get(actor_id, 0) for actor_id in actor_ids)
        held = self.placement.held() if is_same_fleet else {}
        self.shares = assign_experts(
            self.models, actor_ids, budgets_bytes, self.min_copies, self.nodes, held
        )
        self.shares |= {actor_id: [] for actor_id in self.fleet.standby}

    async def ask_members(self, now_s: float) -> None:
        """Have all routers and gateways call at once; routers say which actors they hear."""
        async with self._changed:
            self.asked_at_s = now_s
            self._changed.notify_all()

    # The actors.

    async def next_generation(self, actor_id: str) -> int:
        """Return the generation of an actor that is about to be created, and record it."""
        self._generations[actor_id] += 1
        generation = self._generations[actor_id]
        await self.record()
        return generation

    def last_generation(self, actor_id: str) -> int:
        """Return an actor's last created generation, 0 if there was none."""
        return self._generations.get(actor_id, 0)

    def has_lived(self, actor_id: str) -> bool:
        """Return whether an actor has had a process before its present one."""
        return self._generations[actor_id] > 1

    async def add(self, actor_id: str, handle: ActorHandle, report: ActorReport) -> None:
        """Take an actor that serves now into the placement, with the experts that it reports."""
        self.handles[actor_id] = handle
        self.note(report)
        self.nodes[actor_id] = report.node
        await self.publish(
            lambda placement: placement.with_actor(actor_id, report.generation, report.experts)
        )

    def note(self, report: ActorReport) -> None:
        """Take the newest report of a living actor."""
        self.reports[report.actor_id] = report
        self.kernels.note(report)

    async def leave_placement(self, actor_id: str) -> bool:
        """Publish that an actor holds nothing; returns whether it was in the placement."""
        is_placed = actor_id in self.placement.generations
        if is_placed:
            await self.publish(lambda placement: placement.without(actor_id))
        return is_placed

    def lacking(self, actor_id: str, report: ActorReport) -> set[ExpertKey]:
        """Return the experts that the placement says an actor holds, and its report does not."""
        if self._held_in is not self.placement:
            self._held_in, self._held = self.placement, self.placement.held()
        return set(self._held.get(actor_id, ())).difference(report.experts)

    async def correct(self, actor_id: str, lacking: Collection[ExpertKey]) -> None:
        """Publish that an actor does not hold these experts."""
        change = Change({}, {actor_id: list(lacking)})
        await self.publish(lambda placement: with_change(placement, change))

    async def learn(self, placement: Placement) -> None:
        """Take what unheard actors hold from a router's placement of an earlier epoch.

        Otherwise routers would be told that experts are lost on which they may rely.
        """
        unheard, self.unheard = self.unheard, {}
        held = placement.held()

        def with_unheard(now: Placement) -> Placement:
            for actor_id, generation in unheard.items():
                is_same = placement.generations.get(actor_id) == generation
                if is_same and actor_id not in now.generations:
                    now = now.with_actor(actor_id, generation, held[actor_id])
            return now

        await self.publish(with_unheard)

    def forget(self, actor_id: str) -> None:
        """Drop the handle and the report of an actor that is dead."""
        self.handles.pop(actor_id, None)
        self.reports.pop(actor_id, None)

    def remove(self, actor_id: str) -> None:
        """Drop an actor that left the fleet."""
        self.forget(actor_id)
        self.shares.pop(actor_id, None)
        self.nodes.pop(actor_id, None)

    # What must outlive the controller.

    async def take_over(self, adopted: Adopted, ledger: Ledger) -> None:
        """Begin the epoch that this controller has claimed, with the adopted actors in it.

        An empty placement would tell routers that living experts are lost. Raises
        :class:`StaleEpochError` if a newer controller runs.
        """
        for generations in (adopted.generations, ledger.generations):
            for actor_id, generation in generations.items():
                self._generations[actor_id] = max(generation, self._generations[actor_id])
        earlier = {m.model: m for m in ledger.models if m.model not in self.keys}
        placement = empty_placement(ledger.epoch, [*self.models, *earlier.values()])
        for actor_id, report in adopted.reports.items():
            placement = placement.with_actor(actor_id, report.generation, report.experts)
            self.nodes[actor_id] = report.node
            self.kernels.note(report)
        self.unheard = {a: adopted.generations[a] for a in adopted.silent}
        self.retained = earlier
        self.placement = self._without_broken(placement)
        await self.record()

    async def make_room(self, reports: Mapping[str, ActorReport]) -> None:
        """Withdraw the earlier models where adopted actors cannot hold their shares beside them."""
        own = {model.model: model for model in self.models}
        budgets_bytes = self.fleet.budgets_bytes
        if self.retained and not fits_beside(
            self.shares, reports, own, self.retained, budgets_bytes
        ):
            logger.warning(
                "no memory for the previous model %s beside the new one; ending its requests",
                ", ".join(self.retained),
            )
            self.placement = self.placement.without_models(self.retained)
            self.retained = {}
            await self.record()
        placed = self.placement.models()
        self.withdrawn = {
            actor_id: strangers
            for actor_id, report in reports.items()
            if (strangers := [key for key in report.experts if key.model not in placed])
        }

    async def record(self) -> None:
        """Write the ledger, by which the next controller goes even if no actor survives.

        Raises :class:`StaleEpochError` if a newer controller runs.
        """
        async with self._recording:
            epoch, generations = self.placement.epoch, dict(self._generations)
            models = (*self.models, *self.retained.values())
            ledger = Ledger(epoch, generations, self.fleet.members(), models)
            try:
                await asyncio.to_thread(self._ledger.write, ledger)
            except StaleEpochError:
                self.supersede()
                raise

    async def try_record(self, what: str) -> None:
        """Write the ledger, or log that it lacks ``what``, which the next record brings.

        Raises :class:`StaleEpochError` if a newer controller runs.
        """
        try:
            await self.record()
        except StaleEpochError:
            raise
        except Exception as error:  # Ray's control store may be away for a moment
            logger.warning("the ledger does not record %s (%s)", what, kind_of(error))

    async def check_epoch(self) -> None:
        """Raise :class:`StaleEpochError` if a newer controller runs; called before each kill.

        Raises ``TimeoutError``, or an error of Ray's, where the ledger cannot be read. Callers at
        the same time share one look at it.
        """
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(asyncio.to_thread(self._ledger.check))
            # A look that comes back after its callers' time has nobody to raise to.
            self._checking.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async with asyncio.timeout(LEDGER_TIMEOUT_S):
                await asyncio.shield(self._checking)
        except StaleEpochError:
            self.supersede()
            raise

    def supersede(self) -> None:
        """Stop for good, since a newer controller runs."""
        if not self.is_superseded:
            self.is_superseded = True
            logger.warning("a newer controller took over; this one stops")
            self.on_superseded()

    def refuse_if_superseded(self) -> None:
        """Raise :class:`StaleEpochError` if a newer controller runs."""
        if self.is_superseded:
            raise StaleEpochError("a newer controller has taken over", "epoch")
