"""Chooses the copy of each expert that a router asks: less loaded copies, on actors that answer.

An actor that failed is *avoided*: it is asked only for experts without a copy elsewhere. One whose
rows of this very layer were not finite is asked again only where no other actor has the expert, an
avoided one or not, since an actor that was late is right and this one may never be. A part is
*replaceable* where actors that are not avoided hold copies of all its experts. An actor that is
*slow* (:mod:`router.moe.answer_times`) is asked for as much as it computes while the others compute
the rest, and now and then for a little more, so that the router sees when it is slow no longer.

An expert's rows of one layer all go to the same copy. A row's bits depend on the rows that share
its matrix product, so dividing the rows would make tokens depend on the copies. Nothing here waits
or sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from types import MappingProxyType

import numpy as np

from cluster.placement.placement import Placement
from router.moe.answer_times import AnswerTimes, Judgement
from router.moe.pending import PendingLayer, Sent
from router.moe.permute import Layout, LayoutCache, Part, lay_out
from router.moe.shared_load import SharedLoad

AVOID_S = 10.0
"""How long an actor that failed is avoided, unless a new generation of it comes first. A hung actor
is replaced sooner; an actor that was merely slow is tried again."""
DECAY = 0.9
"""The share of an actor's recent rows that still counts one layer later."""
MAX_LAYOUTS = 256
PROBE_S = 1.0
"""How long after its last part a slow actor is asked for an expert that others would compute
sooner."""
PROBE_SHARE = 0.01
"""The most of a router's time that it waits for such parts."""
NOTHING: Mapping[str, int] = MappingProxyType({})


class CopyChoice:
    """Chooses copies for one dispatcher; for layers with an expert that has several copies.

    It remembers the recent rows of each actor, and the actors that failed lately.
    """

    def __init__(
        self,
        layouts: LayoutCache,
        is_ready: Callable[[str, int], bool],
        shared: SharedLoad | None = None,
    ) -> None:
        """``is_ready`` returns whether an actor's generation has a connection.

        ``shared`` is the load by all dispatchers of a router that has several.
        """
        self._layouts = layouts
        self._is_ready = is_ready
        self._shared = shared
        self._recent_rows: dict[str, float] = {}
        self._laid_for: Placement | None = None
        self._laid: dict[tuple[str | None, ...], Layout] = {}
        self._failed: dict[str, tuple[int, float]] = {}
        """By actor: the generation that failed, and the end of its avoidance."""
        self.times = AnswerTimes() if shared is None else shared.times
        self._owed: Mapping[str, int] = NOTHING
        """The work that each actor owed at the latest choice."""
        self._probe_at_s: dict[str, float] = {}
        """When each slow actor is due to be asked, whatever its time."""

    def note_failure(self, actor_id: str, generation: int, now_s: float) -> None:
        """Record that this generation of an actor did not answer."""
        self._failed[actor_id] = (generation, now_s + AVOID_S)

    def layout(
        self, placement: Placement, layer: PendingLayer, pairs: np.ndarray | None, now_s: float
    ) -> Layout:
        """Return a layer's layout for sending ``pairs``, with one copy of each expert."""
        if placement is not self._laid_for:
            self.times.forget_others(placement.generations)
        damaging = layer.damaging_actors(placement.generations)
        holders: Sequence[tuple[str, ...]] = self._layouts.holders(placement, layer.layer_id)
        if damaging:
            holders = [_usable(actors, damaging) for actors in holders]
        expert_ids = layer.expert_of_pair if pairs is None else layer.expert_of_pair[pairs]
        counts = np.bincount(expert_ids, minlength=len(holders)).tolist()
        avoided = self._avoided(placement, layer, now_s)
        unusable = avoided | self._unready(placement, avoided)
        chosen = self.choose(holders, counts, unusable, now_s)
        layer.owed_before = self._owed
        return self._laid_out(tuple(chosen), placement)

    def note_answers(self, layer: PendingLayer, sent: Sequence[Sent], now_s: float) -> None:
        """Record the times of a layer's answers, as far as they are known."""
        assert layer.attempt is not None
        assert layer.attempt.calls is not None
        owed = layer.owed_before or NOTHING
        for index, took_s in layer.attempt.calls.times_s.items():
            part = sent[index][0]
            rows = len(part.pairs) if self._shared is None else self._shared.part_work(part)
            rows += owed.get(part.actor_id, 0)
            actor = part.actor_id, part.generation
            self.times.note(actor, len(part.expert_ids), rows, took_s, now_s)

    def _laid_out(self, chosen: tuple[str | None, ...], placement: Placement) -> Layout:
        """Return the layout of chosen copies, which is kept, since choices recur."""
        if placement is not self._laid_for or len(self._laid) >= MAX_LAYOUTS:
            self._laid_for, self._laid = placement, {}
        layout = self._laid.get(chosen)
        if layout is None:
            holders = dict(enumerate(chosen))
            layout = self._laid[chosen] = lay_out(holders, placement.generations)
        return layout

    def replaceable(
        self,
        placement: Placement,
        layer: PendingLayer,
        parts: Sequence[Part],
        now_s: float,
        *,
        at_once: bool = False,
    ) -> Sequence[bool]:
        """Return for each part whether other actors, none of them avoided, hold its experts.

        One that has damaged the layer's rows is no other actor: :meth:`layout` prefers any to it.
        With ``at_once`` neither is one without a connection: in its place :meth:`layout` may choose
        the actor that has failed.
        """
        holders = self._layouts.holders(placement, layer.layer_id)
        avoided = self._avoided(placement, layer, now_s)
        avoided |= layer.damaging_actors(placement.generations)
        if at_once:
            avoided |= self._unready(placement, avoided)
        return [is_replaceable(holders, part.expert_ids, part.actor_id, avoided) for part in parts]

    def failed_lately(self, generations: Mapping[str, int], now_s: float) -> frozenset[str]:
        """Return the actors that failed lately and still have the generation that failed."""
        return frozenset(
            actor_id
            for actor_id, (generation, until_s) in self._failed.items()
            if generations.get(actor_id) == generation and now_s < until_s
        )

    def choose(
        self,
        copies: Sequence[tuple[str, ...]],
        counts: Sequence[int],
        avoided: Collection[str],
        now_s: float,
    ) -> list[str | None]:
        """Return the actor for each expert of a layer, ``None`` where there is no copy.

        ``copies`` are the actors that hold each expert, ``counts`` the rows of each expert now. An
        ``avoided`` actor is chosen only for an expert that no other actor holds.
        """
        work = counts
        if self._shared is not None:
            self._owed, work = self._shared.owed(), self._shared.work(counts)
        judgement, recent = self.times.judgement, self._recent_rows
        if judgement is None:
            chosen, rows = choose_copies(copies, work, recent, avoided, self._owed)
        else:
            chosen, rows = choose_soonest(copies, work, recent, avoided, judgement, self._owed)
            self._probe(judgement, copies, work, avoided, chosen, rows, now_s)
        if self._shared is not None:
            self._shared.sent(rows)
        self._recent_rows = {
            actor_id: DECAY * recent.get(actor_id, 0.0) + rows.get(actor_id, 0)
            for actor_id in recent.keys() | rows.keys()
        }
        return chosen

    def _probe(
        self,
        judgement: Judgement,
        copies: Sequence[tuple[str, ...]],
        work: Sequence[int],
        avoided: Collection[str],
        chosen: list[str | None],
        rows: dict[str, int],
        now_s: float,
    ) -> None:
        """Change a choice so that a slow actor that is due computes an expert with few rows."""
        for actor_id in judgement.slowness:
            if actor_id not in rows and now_s >= self._probe_at_s.get(actor_id, 0.0):
                move_smallest(actor_id, copies, work, avoided, chosen, rows)
            if actor_id in rows:
                took_s = judgement.part_s(actor_id, 1, rows[actor_id])
                self._probe_at_s[actor_id] = now_s + max(PROBE_S, took_s / PROBE_SHARE)

    def _avoided(self, placement: Placement, layer: PendingLayer, now_s: float) -> frozenset[str]:
        return self.failed_lately(placement.generations, now_s) | layer.failed_actors

    def _unready(self, placement: Placement, avoided: Set[str]) -> frozenset[str]:
        """Return the actors without a connection yet, except ``avoided`` actors."""
        return frozenset(
            actor_id
            for actor_id, generation in placement.generations.items()
            if actor_id not in avoided and not self._is_ready(actor_id, generation)
        )


def choose_copies(
    copies: Sequence[tuple[str, ...]],
    counts: Sequence[int],
    recent_rows: Mapping[str, float],
    avoided: Collection[str],
    owed: Mapping[str, int] = NOTHING,
) -> tuple[list[str | None], dict[str, int]]:
    """Choose a copy of each expert so that the busiest actor of the layer gets few rows.

    Experts with a single copy come first, then experts with many rows. Each goes to the actor with
    the fewest rows, of this layer and ``owed`` already; among equal actors, to the actor with the
    fewest ``recent_rows``, then with the first name. Returns the actors by expert, and the rows of
    each actor in this layer. In place of rows all numbers may be work
    (:class:`router.moe.shared_load.SharedLoad`).
    """
    usable = [_usable(actors, avoided) for actors in copies]
    chosen: list[str | None] = [actors[0] if actors else None for actors in usable]
    expert_ids = [expert_id for expert_id, count in enumerate(counts) if count]
    expert_ids.sort(key=lambda e: (len(usable[e]) > 1, -counts[e], e))
    rows: Counter[str] = Counter()
    for expert_id in expert_ids:
        if usable[expert_id]:
            actor_id = min(
                usable[expert_id],
                key=lambda a: (rows.get(a, 0) + owed.get(a, 0), recent_rows.get(a, 0.0), a),
            )
            chosen[expert_id] = actor_id
            rows[actor_id] += counts[expert_id]
    return chosen, rows


def choose_soonest(
    copies: Sequence[tuple[str, ...]],
    work: Sequence[int],
    recent_work: Mapping[str, float],
    avoided: Collection[str],
    judgement: Judgement,
    owed: Mapping[str, int] = NOTHING,
) -> tuple[list[str | None], dict[str, int]]:
    """Choose a copy of each expert so that the layer ends early, though actors are unlike.

    As :func:`choose_copies`, but each expert goes to the actor that ends with it first, by
    ``judgement``; this is the longest-processing-time rule for machines of unlike speeds (Gonzalez,
    Ibarra and Sahni 1977). A slow actor is left out of a layer that it would hold up.
    """
    usable = [_usable(actors, avoided) for actors in copies]
    chosen: list[str | None] = [actors[0] if actors else None for actors in usable]
    expert_ids = [expert_id for expert_id, count in enumerate(work) if count and usable[expert_id]]
    expert_ids.sort(key=lambda e: (len(usable[e]) > 1, -work[e], e))
    rows: dict[str, int] = {}
    experts: Counter[str] = Counter()
    for expert_id in expert_ids:

        def end(a: str, more: int = work[expert_id]) -> tuple[float, float, str]:
            before = rows.get(a, 0) + owed.get(a, 0)
            return judgement.part_s(a, experts[a] + 1, before + more), recent_work.get(a, 0.0), a

        actor_id = min(usable[expert_id], key=end)
        chosen[expert_id] = actor_id
        rows[actor_id] = rows.get(actor_id, 0) + work[expert_id]
        experts[actor_id] += 1
    return chosen, rows


def move_smallest(
    actor_id: str,
    copies: Sequence[tuple[str, ...]],
    work: Sequence[int],
    avoided: Collection[str],
    chosen: list[str | None],
    rows: dict[str, int],
) -> None:
    """Give an actor the expert with the least work of those that it holds, where there is any.

    ``chosen`` and ``rows`` are changed, as :func:`choose_soonest` returned them.
    """
    own = [
        expert_id
        for expert_id, actors in enumerate(copies)
        if work[expert_id] and actor_id in _usable(actors, avoided)
    ]
    if not own:
        return
    expert_id = min(own, key=lambda e: (work[e], e))
    before = chosen[expert_id]
    assert before is not None
    chosen[expert_id] = actor_id
    rows[actor_id] = rows.get(actor_id, 0) + work[expert_id]
    rows[before] -= work[expert_id]
    if not rows[before]:
        del rows[before]


def is_replaceable(
    copies: Sequence[tuple[str, ...]],
    expert_ids: Sequence[int],
    actor_id: str,
    avoided: Collection[str],
) -> bool:
    """Return whether each expert has a copy on an actor that is neither this nor ``avoided``."""
    if not avoided:  # this actor is one of the holders
        return all(len(copies[expert_id]) > 1 for expert_id in expert_ids)
    return all(
        any(holder != actor_id and holder not in avoided for holder in copies[expert_id])
        for expert_id in expert_ids
    )


def _usable(actors: tuple[str, ...], avoided: Collection[str]) -> tuple[str, ...]:
    if not avoided or len(actors) < 2:
        return actors
    return tuple(actor_id for actor_id in actors if actor_id not in avoided) or actors
