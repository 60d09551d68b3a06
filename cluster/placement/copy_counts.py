"""How many copies each expert is to have: hot ones more, cold ones fewer. Pure.

The largest load of a single copy is made as small as the room allows, as EPLB's replication does
(github.com/deepseek-ai/EPLB): one more copy goes again and again to the expert whose copies have
the most to do. Unlike there, today's counts are the beginning, and change only where it pays.
"""

from __future__ import annotations

import heapq

import numpy as np

WORTH = 0.05
"""A copy that would carry less than this part of a device's mean share of its layer is not worth
its memory."""
COLD = WORTH / 2
"""Below this a copy is dropped; between the two nothing changes."""
HOTTER = 1.15
"""A copy is taken from one expert for another only where that one's copies carry so many times
what the first one's would carry then."""
FILLING = 0.9
"""Not so where one copy alone is this part of a device's mean share: then nothing but more copies
can even out its layer."""


def replica_counts(
    rates: np.ndarray,
    shares: np.ndarray,
    counts: np.ndarray,
    expert_bytes: np.ndarray,
    room_bytes: float,
    bounds: tuple[int, int],
) -> np.ndarray:
    """Return how many copies each expert is to have.

    ``rates`` are tokens a second, ``shares`` what a device's mean share of the expert's layer is,
    ``counts`` today's copies. All copies take at most ``room_bytes``, where the least number,
    the first of ``bounds``, of each allows that; the second is the most.
    """
    least, most = bounds
    counts = np.clip(counts, least, most)
    _drop_cold(rates, shares, counts, least)
    free_bytes = room_bytes - float((counts * expert_bytes).sum())
    if free_bytes < 0:
        free_bytes = _give_back(rates, counts, expert_bytes, free_bytes, least)
    free_bytes = _fill(rates, shares, counts, expert_bytes, free_bytes, most)
    _exchange(rates, shares, counts, expert_bytes, free_bytes, bounds)
    return counts


def warm_counts(
    rates: np.ndarray, shares: np.ndarray, counts: np.ndarray, least: int
) -> np.ndarray:
    """Return today's ``counts`` without copies that carry next to nothing.

    In a layer without any load, which must have been so for long, that is each beyond ``least``.
    The rest is as in :func:`replica_counts`.
    """
    counts = counts.copy()
    _drop_cold(rates, shares, counts, least)
    idle = shares == 0
    counts[idle] = np.minimum(counts[idle], least)
    return counts


def _drop_cold(rates: np.ndarray, shares: np.ndarray, counts: np.ndarray, least: int) -> None:
    """Take away copies that carry next to nothing; a layer without any load tells nothing."""
    told = shares > 0
    enough = np.ceil(rates[told] / (COLD * shares[told]))
    counts[told] = np.minimum(counts[told], np.maximum(enough, least))


def _give_back(
    rates: np.ndarray, counts: np.ndarray, expert_bytes: np.ndarray, free_bytes: float, least: int
) -> float:
    """Take copies away, those that are missed least first, until the rest fits."""
    heap = [(rates[e] / (counts[e] - 1), e) for e in np.flatnonzero(counts > least).tolist()]
    heapq.heapify(heap)
    while free_bytes < 0 and heap:
        _, expert = heapq.heappop(heap)
        counts[expert] -= 1
        free_bytes += expert_bytes[expert]
        if counts[expert] > least:
            heapq.heappush(heap, (rates[expert] / (counts[expert] - 1), expert))
    return free_bytes


def _fill(
    rates: np.ndarray,
    shares: np.ndarray,
    counts: np.ndarray,
    expert_bytes: np.ndarray,
    free_bytes: float,
    most: int,
) -> float:
    """Add copies of the hottest experts while there is room and they are worth it."""
    heap = [(-rates[e] / counts[e], e) for e in np.flatnonzero(counts < most).tolist()]
    heapq.heapify(heap)
    while heap:
        _, expert = heapq.heappop(heap)
        wanted = rates[expert] / (counts[expert] + 1) >= WORTH * shares[expert] > 0
        if not wanted or expert_bytes[expert] > free_bytes:
            continue
        counts[expert] += 1
        free_bytes -= expert_bytes[expert]
        if counts[expert] < most:
            heapq.heappush(heap, (-rates[expert] / counts[expert], expert))
    return free_bytes


def _exchange(
    rates: np.ndarray,
    shares: np.ndarray,
    counts: np.ndarray,
    expert_bytes: np.ndarray,
    free_bytes: float,
    bounds: tuple[int, int],
) -> None:
    """Take copies from experts that miss them little for those that are much hotter."""
    least, most = bounds
    hot = [(-rates[e] / counts[e], e) for e in np.flatnonzero(counts < most).tolist()]
    spare = [(rates[e] / (counts[e] - 1), e) for e in np.flatnonzero(counts > least).tolist()]
    heapq.heapify(hot)
    heapq.heapify(spare)
    # What is told of an expert twice is old once its count has changed, and then says too little:
    # it is taken from, or given to, too rarely, never too often.
    while hot and spare:
        (heat, taker), (loss, giver) = hot[0], spare[0]
        is_worth = rates[taker] / (counts[taker] + 1) >= WORTH * shares[taker] > 0
        if -heat <= (1.0 if -heat >= FILLING * shares[taker] else HOTTER) * loss:
            return
        if not is_worth or expert_bytes[taker] > free_bytes + expert_bytes[giver]:
            heapq.heappop(hot)
            continue
        heapq.heappop(hot)
        heapq.heappop(spare)
        free_bytes += expert_bytes[giver] - expert_bytes[taker]
        counts[taker] += 1
        counts[giver] -= 1
        if counts[taker] < most:
            heapq.heappush(hot, (-rates[taker] / counts[taker], taker))
        if counts[giver] > least:
            heapq.heappush(spare, (rates[giver] / (counts[giver] - 1), giver))
