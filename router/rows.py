"""A layer's rows: who gets which, and their way to the experts and back.

Each of these is some small operations on arrays, and in a step of few tokens their number is what
a layer costs: so ``router/native.c`` does each at once, where it was built. Where it was not (there
was no C compiler when the package was installed) numpy does the same.

Dimension letters: T tokens, K experts per token, P = T x K pairs, E experts, H hidden size. Pair
t * K + r is token t with the expert that the gate put at rank r.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from cluster.frames import Buffer

try:
    import expertmesh_native
except ImportError:
    native: ModuleType | None = None
else:
    native = expertmesh_native


def slots_of(ids: np.ndarray) -> np.ndarray:
    """Return where each pair's row stands, int64 [P]: a token's rows by ascending expert.

    ``ids`` [T, K] are the gate's choices, int64 and contiguous. In that order their sum is the same
    whoever computes the shares.
    """
    k = ids.shape[1]
    slots = np.empty(ids.size, np.int64)
    if native is not None:
        native.slots(ids, k, slots)
        return slots
    order = ids.argsort(axis=1, kind="stable")
    slots[(order + np.arange(0, ids.size, k)[:, None]).ravel()] = np.arange(ids.size)
    return slots


def route(
    expert_ids: np.ndarray, k: int, place_of: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Order pairs by their expert's place, then by rank, then by token.

    ``expert_ids`` int64 [P] has the expert of every pair of the layer, ``place_of`` int64 [E] the
    place of every expert; ``pairs`` are ascending. Returns the pairs in order, and how many each
    place has.
    """
    if native is not None:
        ordered = np.empty(len(pairs), np.int64)
        counts: list[int] = native.route(expert_ids, k, place_of, pairs, ordered)
        return ordered, counts
    places = place_of[expert_ids[pairs]]
    keys = (places * k + pairs % k) * len(expert_ids) + pairs
    counts = np.bincount(places, minlength=len(place_of)).tolist()
    return pairs[keys.argsort()], counts


def gather(rows: np.ndarray, ordered: np.ndarray, k: int) -> memoryview:
    """Return the bytes of the token's row of each pair; ``rows`` [T, H] are raw values."""
    if native is not None and rows.flags.c_contiguous:
        row_bytes = rows.shape[1] * rows.itemsize
        return memoryview(native.gather(rows, ordered, k, row_bytes))
    return rows.take(ordered // k, axis=0).data.cast("B")


def scatter(received: Buffer, pairs: np.ndarray, slots: np.ndarray, output: np.ndarray) -> None:
    """Put the rows that were received for ``pairs`` where they belong in ``output`` [P, H].

    ``output`` has raw values, and as many bytes must be ``received`` as that many rows of it have.
    """
    if native is not None:
        native.scatter(received, pairs, slots, output, output.shape[1] * output.itemsize)
        return
    values = np.frombuffer(received, output.dtype)
    output[slots[pairs]] = values.reshape(len(pairs), -1)
