"""Suspicion of silent actors: asks routers and the other actors before an actor is replaced."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from cluster.controller.health.liveness import (
    DOUBT_S,
    Signs,
    Silence,
    Silences,
    Verdict,
    has_last_copy,
)
from cluster.controller.records.members import Members
from cluster.controller.records.state import ClusterState
from cluster.errors import StaleEpochError

SUSPICION_S = 1.0
"""How long a router's suspicion counts; the router repeats it while it waits."""
ASK_PERIOD_S = 0.4
"""Time between two questions to the routers while an actor is silent."""
ANSWER_S = 0.8
"""How long the controller waits for the routers' answers."""

logger = logging.getLogger("expertmesh.controller")


class _Suspected(NamedTuple):
    """A router's last report that it waits for an actor in vain, and the first in a row."""

    at_s: float = -math.inf
    since_s: float = -math.inf
    hears_others: bool = False


class Suspicion:
    """Decides which silent actors are replaced, for one controller."""

    def __init__(
        self, state: ClusterState, members: Members, heartbeat_now: Callable[[str], None]
    ) -> None:
        """``heartbeat_now`` sends an actor a heartbeat; ``members`` knows the routers."""
        self._state = state
        self._members = members
        self._heartbeat_now = heartbeat_now
        self._silences = Silences()
        self._suspected: dict[str, _Suspected] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._logged: dict[str, Verdict] = {}
        self._doubted_at_s: dict[str, float] = {}
        """When the controller first asked others about each silent actor."""
        self._asked_at_s = -math.inf

    def suspect(self, actor_id: str, hears_others: bool) -> None:
        """Note that a router gets no answer from an actor, and whether it hears other actors."""
        now_s = time.monotonic()
        last = self._suspected.get(actor_id, _Suspected())
        since_s = last.since_s if now_s - last.at_s < SUSPICION_S else now_s
        self._suspected[actor_id] = _Suspected(now_s, since_s, hears_others)

    def answered(self, actor_id: str) -> None:
        """Note that an actor answered a heartbeat."""
        self._silences.note(actor_id, None)
        self._doubted_at_s.pop(actor_id, None)
        self._verdicts.pop(actor_id, None)
        if verdict := self._logged.pop(actor_id, None):
            logger.info("%s answers again (%s)", actor_id, verdict)

    def forget(self, actor_id: str) -> None:
        """Drop an actor that is dead or gone; a suspicion of it says nothing of its successor."""
        self._silences.forget(actor_id)
        for by_actor in (self._suspected, self._doubted_at_s, self._verdicts, self._logged):
            by_actor.pop(actor_id, None)

    def notes(self) -> dict[str, str]:
        """Return a line for the status on each actor that is silent, by its id."""
        return {
            actor_id: f"has answered no heartbeat for {silent_s:.0f} s: {self._verdicts[actor_id]}"
            for actor_id, silent_s in self._silences.silent().items()
            if actor_id in self._verdicts
        }

    async def is_lost(self, actor_id: str, silence: Silence, now_s: float) -> bool:
        """Return whether a silent actor is to be replaced, after a look at its heartbeat.

        Raises :class:`StaleEpochError` if a newer controller runs.
        """
        self._silences.note(actor_id, silence)
        if silence.silent_s < DOUBT_S:
            return False
        await self._ask(actor_id, now_s)
        signs = self._signs(actor_id, now_s)
        verdict = self._silences.verdict(actor_id, signs, lambda: self._goes_later(actor_id), now_s)
        if verdict is not Verdict.WAITS:
            self._verdicts[actor_id] = verdict  # others go by it meanwhile
        if verdict is Verdict.REPLACED and not await self._may_end():
            verdict = self._verdicts[actor_id] = Verdict.NO_LEDGER
        if verdict is not Verdict.WAITS and verdict is not self._logged.get(actor_id):
            self._logged[actor_id] = verdict
            logger.warning(
                "%s has answered no heartbeat for %.1f s: %s", actor_id, silence.silent_s, verdict
            )
        return verdict is Verdict.REPLACED

    async def _ask(self, actor_id: str, now_s: float) -> None:
        """Ask the routers again and again, and once all other actors."""
        if actor_id not in self._doubted_at_s:
            self._doubted_at_s[actor_id] = now_s
            for other in self._state.handles:
                if other != actor_id:
                    self._heartbeat_now(other)
        if now_s - self._asked_at_s >= ASK_PERIOD_S:
            self._asked_at_s = now_s
            await self._state.ask_members(now_s)

    def _signs(self, actor_id: str, now_s: float) -> Signs:
        suspected = self._suspected.get(actor_id, _Suspected())
        asked_at_s = self._doubted_at_s[actor_id]
        generation = self._state.placement.generations.get(actor_id, 0)
        return Signs(
            is_suspected=now_s - suspected.at_s < SUSPICION_S,
            hears_others=suspected.hears_others,
            heard_at_s=self._members.heard_at_s(actor_id, generation),
            is_asked=self._have_answered(asked_at_s, now_s),
            is_suspicion_new=not self._have_answered(suspected.since_s, now_s),
            members_at_s=self._members.last_at_s(),
        )

    def _have_answered(self, since_s: float, now_s: float) -> bool:
        """Return whether all routers have called since a time, or have had their time to."""
        is_over = now_s - since_s >= ANSWER_S
        return is_over or self._members.have_called_since("router", since_s)

    def _goes_later(self, actor_id: str) -> bool:
        placement, shares = self._state.placement, self._state.shares
        gone = (Verdict.LAST_COPY, Verdict.REPLACED)
        lost = {actor_id, *(a for a, verdict in self._verdicts.items() if verdict in gone)}
        # An actor that is to be replaced leaves the placement later; its successor loads the same.
        replaced = {a for a, verdict in self._verdicts.items() if verdict is Verdict.REPLACED}
        loading = (set(self._state.fleet.specs) - set(placement.generations)) | replaced
        coming = {key for other in loading - {actor_id} for key in shares.get(other, ())}
        return has_last_copy(actor_id, placement.holders, lost, coming)

    async def _may_end(self) -> bool:
        """Return whether this controller holds its epoch still, as far as the ledger tells."""
        try:
            await self._state.check_epoch()
        except StaleEpochError:
            raise
        except Exception as error:  # Ray's control store is away, or cut off with the actors
            logger.debug("the ledger cannot be read", exc_info=error)
            return False
        return True
