"""How many copies each expert is to have: hot experts more, cold experts fewer.

The largest load of a single copy is made as small as the room allows, as in EPLB's replication
(github.com/deepseek-ai/EPLB): the next copy always goes to the expert whose copies have the most
load. Unlike EPLB this begins with today's counts, and changes them only where that pays.

Letters: N experts of all layers.
"""

from __future__ import annotations

import heapq

import numpy as np

WORTH = 0.05
"""A new copy must carry at least this part of the mean device's load of its layer."""
COLD = WORTH / 2
"""A copy that carries less than this part is dropped; between the two nothing changes."""
HOTTER = 1.15
"""An expert gives a copy to another only where the other's copies carry this many times the load
that the giver's copies would carry then."""
FILLING = 0.9
"""A single copy with this part of the mean device's load needs no :data:`HOTTER`: only more copies
can even out its layer."""


def copy_counts(
    rates: np.ndarray,
    shares: np.ndarray,
    counts: np.ndarray,
    expert_bytes: np.ndarray,
    room_bytes: float,
    bounds: tuple[int, int],
) -> np.ndarray:
    """Return how many copies each expert is to have, [N].

    ``rates`` are the experts' tokens a second, ``shares`` the mean device's load of each expert's
    layer, ``counts`` today's copies, all [N]. ``bounds`` are the least and the most copies of an
    expert. All copies together take at most ``room_bytes``, unless the least number takes more.
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
    """Return today's ``counts`` without the copies that carry next to nothing, [N].

    In a layer without load, which must have lasted for long, those are all beyond ``least``. The
    arguments are those of :func:`copy_counts`.
    """
    counts = counts.copy()
    _drop_cold(rates, shares, counts, least)
    idle = shares == 0
    counts[idle] = np.minimum(counts[idle], least)
    return counts


def _drop_cold(rates: np.ndarray, shares: np.ndarray, counts: np.ndarray, least: int) -> None:
    """Drop copies that carry next to nothing; a layer without any load is left as it is."""
    has_load = shares > 0
    enough = np.ceil(rates[has_load] / (COLD * shares[has_load]))
    counts[has_load] = np.minimum(counts[has_load], np.maximum(enough, least))


def _give_back(
    rates: np.ndarray, counts: np.ndarray, expert_bytes: np.ndarray, free_bytes: float, least: int
) -> float:
    """Drop copies until the rest fits, first where the other copies get the least load."""
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
    """Add copies of the hottest experts while there is room and they carry enough."""
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
    """Move copies from cold experts to much hotter ones."""
    least, most = bounds
    hot = [(-rates[e] / counts[e], e) for e in np.flatnonzero(counts < most).tolist()]
    spare = [(rates[e] / (counts[e] - 1), e) for e in np.flatnonzero(counts > least).tolist()]
    heapq.heapify(hot)
    heapq.heapify(spare)
    # An expert's entry in the other heap is old once its count has changed. An old entry makes
    # exchanges rarer, never more frequent.
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
