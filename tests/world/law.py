"""The law of a world: what must hold at every event, and at the end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.controller.controller import Controller
from cluster.controller.records.ledger import Ledger
from cluster.controller.records.state import ClusterState
from cluster.placement.placement import Placement
from router.engine.replica import RouterReplica
from router.gateway.limits.room import GRACE_S
from router.gateway.upstream.ray_upstream import RayUpstream
from tests.world.clients import Answer
from tests.world.kernel import Process
from tests.world.law_of_queues import look_at_queues, unsent_bytes
from tests.world.law_of_time import is_poison, is_too_short
from tests.world.mixtures import kept_by_mixtures
from tests.world.model import tokens_of

if TYPE_CHECKING:
    from tests.world.ray_api import Handle
    from tests.world.world import World

ALLOWED = {
    "UnavailableError", "ExpertUnavailableError", "DeadlineExceededError", "OverloadedError",
    "InvalidRequestError", "ModelReplacedError", "NoGateway",
}  # fmt: skip
"""The errors that a client may get of faults; each says what it is to do."""
STANDING = {
    "CallLink._read", "TokenSender._open", "LinkListener._accept", "LinkListener._admit",
    "PlacementWatcher._bounded", "PlacementWatcher._watch_forever",
}  # fmt: skip
"""The coroutines of a router or a gateway that last as long as it."""
LATE_S = 0.25
"""How late an answer may come beside its deadline and the gateway's grace."""
USED_S = 1.0
"""An actor that computed rows for a router within this time is in use."""
UNTRUE_S = 4.0
"""How long a gateway may be ready after an expert has lost its last copy."""
END_S = 1.0
"""How long a process may take to end that is ended."""
WELL_S = 5.0
"""An actor at which nothing failed for so long is healthy."""


@dataclass(frozen=True)
class Breach:
    """A law that was broken: which, when, and how."""

    law: str
    at_s: float
    text: str


class Law:
    def __init__(self, world: World) -> None:
        self._world = world
        self.breaches: list[Breach] = []
        self._writers: dict[int, str] = {}
        self._epoch = 0
        self._untrue_since_s: dict[str, float] = {}

    def broken(self, law: str, text: str) -> None:
        self.breaches.append(Breach(law, self._world.kernel.now_s, text))
        self._world.note(f"BROKEN {law}: {text}")

    # At every event.

    def ledger_written(self, key: str, value: bytes) -> None:
        """Look at a record of the ledger: epochs only rise, and each has one writer.

        The record of the highest number counts. A writer that is late may make one of a lower
        number, which it takes back.
        """
        keys = [name for name in self._world.cluster.store if "/ledger/" in name]
        if _number(key) < max(map(_number, keys)):
            return
        record = json.loads(value)
        epoch, writer = Ledger.from_json(record["ledger"]).epoch, record["writer"]
        if epoch < self._epoch:
            self.broken("epochs rise", f"{epoch} after {self._epoch}")
        if self._writers.setdefault(epoch, writer) != writer:
            self.broken("one writer of the ledger", f"two writers of epoch {epoch}")
        self._epoch = max(self._epoch, epoch)

    def killed(self, handle: Handle, killer: Process | None) -> None:
        """Look at a kill: nobody healthy is killed whom a router uses."""
        world, process = self._world, handle.process
        now_s = world.kernel.now_s
        if not process.is_alive or process.is_paused or not world.serve.is_wanted:
            return
        if not handle.is_started or not handle.instance._actor._bank.experts:
            return  # it holds nothing
        if now_s - world.used_at_s.get(process.name, -9.0) > USED_S:
            return
        if world.is_broken(process) or now_s - world.touched_at_s.get(process.name, -99.0) < WELL_S:
            return
        if world.is_removed(handle, killer) or world.may_be_unheard(process, killer):
            return
        if world.is_left(handle):
            return
        self.broken(
            "nobody healthy is killed", f"{process.name} by {killer.name if killer else '?'}"
        )

    def published(self, before: Placement, after: Placement, controller: ClusterState) -> None:
        if after.order < before.order:
            self.broken("epochs rise", f"placement {after.order} after {before.order}")
        self._world.copies.published(before, after, controller)

    def look(self) -> None:
        """Look at all queues, and at readiness."""
        look_at_queues(self._world)
        for replica in self._world.serve.deployments["gateway"].running():
            self._ready(replica.process, replica.handle.instance.deployment.ready().is_ready)

    def _ready(self, process: Process, is_ready: bool) -> None:
        """A gateway is not ready for long while no model has all of its experts.

        Where other weights are deployed, the earlier model serves until they have copies.
        """
        controller = self._world.controller()
        now_s = self._world.kernel.now_s
        is_whole = controller is None or _has_whole_model(controller._state.placement)
        if is_whole or not is_ready or self._world.is_away(process):
            self._untrue_since_s[process.name] = now_s
        elif now_s - self._untrue_since_s.setdefault(process.name, now_s) > UNTRUE_S:
            self.broken("readiness is true", f"{process.name} is ready for {UNTRUE_S:g} s")

    # At the end.

    def answers(self, answers: list[Answer], identities: set[str]) -> None:
        """Look at all answers: right, whole, in time, and with a typed error if any."""
        for answer in answers:
            self._tokens(answer, identities)
            self._end(answer, answers)

    def _tokens(self, answer: Answer, identities: set[str]) -> None:
        plan = answer.plan
        for choice in answer.choices:
            got = tuple(choice.token_ids)
            if not got:
                continue
            if choice.identity not in identities:
                self.broken("an answer names its model", f"{choice.identity!r} at {plan.at_s:.3f}")
                continue
            if choice.forgot_exact:
                self.broken("inexact stays inexact", f"the request at {plan.at_s:.3f}")
            if not choice.is_exact:
                if plan.on_expert_loss == "strict":
                    self.broken("strict is exact", f"the request at {plan.at_s:.3f}")
                continue
            right = tokens_of(choice.identity, plan.prompt, plan.max_tokens, plan.form)
            if got != right[: len(got)]:
                place = next(i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b)
                self.broken(
                    "tokens are one model's",
                    f"the request at {plan.at_s:.3f}, token {place} of {len(got)}",
                )
            if choice.finish_reason and len(got) != plan.max_tokens:
                self.broken("answers are whole", f"{len(got)} of {plan.max_tokens} tokens")

    def _end(self, answer: Answer, answers: list[Answer]) -> None:
        plan = answer.plan
        if answer.ended_at_s is None:
            self.broken("every request is answered", f"the request at {plan.at_s:.3f}")
            return
        took_s = answer.ended_at_s - answer.begun_at_s
        if took_s > plan.timeout_s + GRACE_S + LATE_S + self._world.hung_s(answer):
            self.broken(
                "answers come in time", f"{took_s:.2f} s of {plan.timeout_s:g} at {plan.at_s:.3f}"
            )
        if self._world.keys.judges(answer):
            return
        if answer.error in ("InternalError", "PoisonedRequestError") and is_poison(answer):
            return
        if answer.error == "InternalError" and self._world.excuses.may_be_internal(answer):
            return
        if answer.error and answer.error not in ALLOWED:
            self.broken(
                "errors are typed and true",
                f"{answer.error} at {plan.at_s:.3f}: {answer.message[:200]}",
            )
        elif answer.error == "DeadlineExceededError" and is_too_short(
            answer, answers, self._world.happenings.hit
        ):
            return
        elif answer.error:
            told = f"{answer.error} at {plan.at_s:.3f}: {answer.message[:200]}"
            if excuse := self._world.excuses.of(answer):
                self._world.note(f"excused: {told}: {excuse}")
            else:
                self.broken("what can be served is served", told)

    def healed(self, since_s: float) -> None:
        """Look at the deployment once the weather has calmed."""
        world = self._world
        reason = world.unhealed()
        if reason:
            self.broken("healed in time", f"{world.kernel.now_s - since_s:.1f} s later: {reason}")

    def nothing_left(self) -> None:
        """Look at what is kept for requests that have ended."""
        for name, kept in self.kept().items():
            self.broken("nothing is left", f"{name}: {kept}")
        self._orphans()
        for error in self._world.kernel.errors:
            self.broken("nothing raises unseen", error)

    def kept(self) -> dict[str, dict[str, int]]:
        """Return what each process keeps for requests, without the processes that keep nothing."""
        world = self._world
        found = dict(kept_by_mixtures(world))
        for replica in world.serve.deployments["router"].running():
            found[replica.process.name] = self._router(replica.handle.instance, replica.process)
        for replica in world.serve.deployments["gateway"].running():
            upstream = replica.handle.instance.upstream
            found[replica.process.name] = {
                "inboxes": len(upstream._inboxes),
                "attempts": len(upstream._attempts),
                "held": sum(upstream._held.values()),
                "streams": upstream._num_streams,
                "routes": len(upstream._link._routes),
                "calls": _unanswered(upstream),
                **replica.handle.instance.kept(),
                **self._tasks(replica.process),
            }
        for handle in world.cluster.actors.values():
            if handle.is_started and handle.process.is_alive:
                actor = handle.instance._actor
                found[handle.process.name] = {
                    "rows": actor._queue.queued_rows,
                    "answers": sum(len(peer.channel.outgoing) for peer in actor._streams._peers),
                }
        left = {name: {k: n for k, n in kept.items() if n} for name, kept in found.items()}
        return {name: kept for name, kept in left.items() if kept}

    def _tasks(self, process: Process) -> dict[str, int]:
        """Return the coroutines of a router or gateway beside those that never end."""
        names = self._world.kernel.tasks_of(process)
        return dict(Counter(name for name in names if name not in STANDING))

    def _router(self, router: RouterReplica, process: Process) -> dict[str, int]:
        scheduler = router._scheduler
        return {
            "requests": len(router._requests),
            "sequences": len(scheduler.sequences()),
            # Of these, pages that are kept only to be shared are free.
            "pages": scheduler.num_pages - scheduler.num_free_pages,
            "waiting tokens": scheduler.waiting.num_tokens,
            "unsent bytes": unsent_bytes(router),
            **self._tasks(process),
        }

    def _orphans(self) -> None:
        """Each actor that lives is one that the controller keeps, once; it keeps all of them."""
        controller = self._world.controller()
        if controller is None:
            return
        for actor_id, task in controller._keeper._tasks.items():
            if task.done() and not controller._state.is_superseded:
                self.broken("every actor is kept", f"nobody keeps {actor_id}")
        if self._extra(controller):  # one may be about to end
            self._world.run(self._world.kernel.now_s + END_S)
        for actor_id, number in self._extra(controller).items():
            self.broken("nothing is left", f"{number} processes of {actor_id}")

    def _extra(self, controller: Controller) -> dict[str, int]:
        """Return the numbers of processes of actors that are to have none, or one."""
        living = Counter(
            name.rpartition(":g")[0].rpartition(":")[2]
            for name, handle in self._world.cluster.actors.items()
            if handle.process.is_alive
        )
        specs = controller._state.fleet.specs
        return {name: number for name, number in living.items() if name not in specs or number > 1}


def _unanswered(upstream: RayUpstream) -> int:
    """Return the calls over links that a gateway waits for."""
    return sum(
        link.num_unanswered
        for calls in upstream._routers.values()
        for link in calls._links.values()
    )


def _has_whole_model(placement: Placement) -> bool:
    """Return whether all experts of a model have copies."""
    return bool(placement.models() - {key.model for key in placement.missing()})


def _number(key: str) -> int:
    return int(key.rpartition("/")[2])
