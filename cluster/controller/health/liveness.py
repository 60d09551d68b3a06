"""Tells a hung actor from a busy one, and from one that only the controller does not hear.

Pure, with the caller's clock.

An actor whose heartbeat stays unanswered is *silent*. The fault may be its own, or that of the
network between it and the controller. Routers have connections of their own to the actors, so an
actor that a router hears is kept. Where many actors fall silent together, the controller suspects
its own network first.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.spec import ExpertKey

HUNG_S = 60.0
SILENT_S = 3.0
"""How long a heartbeat may stay unanswered."""
SUSPECTED_S = 0.8
"""The same while a router times out too: then two ways to the actor that share none of its threads
are silent."""
LOOK_S = 0.1
"""Time between two checks whether a heartbeat is answered."""
DOUBT_S = 0.4
"""The silence of an actor after which the controller asks routers and all other actors."""
PROBE_S = 0.3
"""The silence of an actor that counts when silent actors are counted; less than what is left of
``SUSPECTED_S`` when the others are asked."""
TOGETHER_S = 5.0
"""Silences that begin within this time of each other count as simultaneous."""
HEARD_MARGIN_S = 0.3
"""A router's word counts if it heard the actor this long after the silence began: the word and
the answer take a moment on their way."""
CONFIRM_S = 15.0
"""A silence of many that lasts this long counts if a router times out too, even if that router
hears nobody else either. Ray declares a node dead that is cut off for as long."""
LAST_COPY_S = 10.0
"""How much longer an actor with the last copy of an expert may be silent while another actor
loads that expert."""


class Progress:
    """An actor's progress, from its heartbeats."""

    def __init__(self, now_s: float) -> None:
        """Begin as if the actor had just computed a batch."""
        self._steps = -1
        self._moved_at_s = now_s

    def is_hung(self, steps: int, queued_rows: int, now_s: float) -> bool:
        """Take a heartbeat; returns whether rows have waited for ``HUNG_S`` without a batch.

        ``steps`` counts the batches that the actor has computed, ``queued_rows`` the waiting rows.
        """
        if steps != self._steps or queued_rows == 0:
            self._steps, self._moved_at_s = steps, now_s
        return now_s - self._moved_at_s >= HUNG_S


class Silence:
    """How long a heartbeat stays unanswered, for a caller that checks every ``LOOK_S``.

    A late check means that the caller's process did not run, and perhaps the actor's did not
    either. So a check counts for at most ``LOOK_S``.
    """

    def __init__(self, now_s: float) -> None:
        """Begin when the heartbeat is sent."""
        self.since_s = now_s
        self.silent_s = 0.0
        self._checked_at_s = now_s

    def look(self, now_s: float) -> None:
        """Note a check without an answer."""
        self.silent_s += min(now_s - self._checked_at_s, LOOK_S)
        self._checked_at_s = now_s


class Verdict(enum.StrEnum):
    """What happens to a silent actor, and why; the text is for people."""

    WAITS = "its timeout has not passed"
    HEARD = "routers hear it"
    CUT_OFF = "the controller itself may be cut off"
    NO_LEDGER = "the ledger cannot be read"
    LAST_COPY = "it has the last copy of an expert that another actor loads"
    REPLACED = "it is being replaced"


@dataclass(frozen=True, slots=True)
class Signs:
    """What others know of a silent actor; times are the controller's.

    ``is_suspected`` says that a router waits for the actor and times out, ``hears_others`` that
    this router hears other actors. ``heard_at_s`` is when any router last heard the actor; an actor
    that no router asks is not heard. ``is_asked`` says that all routers have said so, or had their
    time. ``is_suspicion_new`` says that they have not since the suspicion came.
    ``members_at_s`` is when any router or gateway last called, ``None`` if none is known.
    """

    is_suspected: bool = False
    hears_others: bool = False
    heard_at_s: float = -math.inf
    is_asked: bool = True
    is_suspicion_new: bool = False
    members_at_s: float | None = None


class Silences:
    """The silences of all actors that are sent heartbeats, and the verdict on each."""

    def __init__(self) -> None:
        """Begin without actors."""
        self._silent: dict[str, Silence] = {}
        self._watched: set[str] = set()
        self._cut_off_at_s = self._heard_at_s = -math.inf
        self._confirmed_at_s: dict[str, float] = {}
        """Since when routers have confirmed each actor's silence."""

    def note(self, actor_id: str, silence: Silence | None) -> None:
        """Note the silence of an actor, or that it answered."""
        self._watched.add(actor_id)
        if silence is None:
            self._silent.pop(actor_id, None)
            self._confirmed_at_s.pop(actor_id, None)
        else:
            self._silent[actor_id] = silence

    def forget(self, actor_id: str) -> None:
        """Drop an actor that gets no more heartbeats."""
        self._watched.discard(actor_id)
        self._silent.pop(actor_id, None)
        self._confirmed_at_s.pop(actor_id, None)

    def silent(self) -> dict[str, float]:
        """Return for how long each silent actor has been so."""
        return {actor_id: silence.silent_s for actor_id, silence in self._silent.items()}

    def verdict(
        self, actor_id: str, signs: Signs, goes_later: Callable[[], bool], now_s: float
    ) -> Verdict:
        """Decide about a silent actor.

        ``goes_later`` returns whether another actor is to be replaced before it, as the order of
        :func:`has_last_copy` says.
        """
        silence = self._silent[actor_id]
        is_partitioned = self._is_partitioned(silence, now_s)
        is_confirmed = signs.is_suspected and (signs.hears_others or silence.silent_s >= CONFIRM_S)
        confirmed_s = self._confirmed_s(actor_id, is_confirmed, now_s)
        limit_s = SUSPECTED_S if signs.is_suspected and not is_partitioned else SILENT_S
        if silence.silent_s < limit_s:
            return Verdict.WAITS
        if signs.heard_at_s > max(silence.since_s + HEARD_MARGIN_S, now_s - limit_s):
            self._heard_at_s = now_s
            return Verdict.HEARD
        if not signs.is_asked:
            return Verdict.WAITS
        was_cut_off_s = now_s - self._cut_off_at_s
        if not is_confirmed:
            if self._is_cut_off(silence, signs):
                self._cut_off_at_s = now_s
                return Verdict.CUT_OFF
            if was_cut_off_s < limit_s:  # the others have just come back
                return Verdict.WAITS
        elif signs.is_suspicion_new and (
            was_cut_off_s < SILENT_S or self._are_many_silent(silence)
        ):
            # A cut network delivers a suspicion late: routers that hear the actor say so.
            return Verdict.WAITS
        elif is_partitioned and confirmed_s < SUSPECTED_S:
            # A router that hears others again may not have asked this one since.
            return Verdict.WAITS
        if silence.silent_s < limit_s + LAST_COPY_S and goes_later():
            return Verdict.LAST_COPY
        return Verdict.REPLACED

    def _confirmed_s(self, actor_id: str, is_confirmed: bool, now_s: float) -> float:
        """Return for how long routers have confirmed an actor's silence without a break."""
        if not is_confirmed:
            self._confirmed_at_s.pop(actor_id, None)
            return 0.0
        return now_s - self._confirmed_at_s.setdefault(actor_id, now_s)

    def _is_cut_off(self, silence: Silence, signs: Signs) -> bool:
        """Return whether so many are silent that the controller's own network may be at fault.

        A controller of one actor goes by routers and gateways: it is cut off if it hears none of
        them either.
        """
        if self._are_many_silent(silence):
            return True
        if signs.is_suspected or signs.members_at_s is None:
            return False
        are_all_silent = self._num_silent(silence) == len(self._watched)
        return are_all_silent and signs.members_at_s <= silence.since_s

    def _is_partitioned(self, silence: Silence, now_s: float) -> bool:
        """Return whether many are silent, and a router has heard one of the silent lately.

        The controller's own silence proves nothing then; only a router that times out does.
        """
        return self._are_many_silent(silence) and now_s - self._heard_at_s < SILENT_S

    def _are_many_silent(self, silence: Silence) -> bool:
        """Return whether half of the actors or more are silent together, and at least two."""
        together = self._num_silent(silence)
        return together >= 2 and 2 * together >= len(self._watched)

    def _num_silent(self, silence: Silence) -> int:
        return sum(
            other.silent_s >= PROBE_S and abs(other.since_s - silence.since_s) <= TOGETHER_S
            for other in self._silent.values()
        )


def has_last_copy(
    actor_id: str,
    holders: Mapping[ExpertKey, Sequence[str]],
    lost: Collection[str],
    coming: Collection[ExpertKey],
) -> bool:
    """Return whether an actor has a last copy of an expert that another actor restores first.

    ``holders`` are the actors that hold each expert, ``lost`` the holders that are silent and
    heard by no router, ``coming`` the experts that actors load. Of the actors that have the last
    copies of the same expert, the first by its id is replaced first. The others follow when its
    successor has loaded: until then they may still come back with their copies.
    """
    return any(
        key in coming or min(actors) < actor_id
        for key, actors in holders.items()
        if actor_id in actors and all(other in lost for other in actors)
    )
