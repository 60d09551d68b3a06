"""The experts of a step's tokens: ids that requests force, and rows for requests that ask.

Dimension letters: S tokens of the step, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from router.engine.emission import Emission
from router.engine.sequence import ScheduledChunk
from router.messages.request import TokenEvent
from router.messages.routed import LITTLE_ENDIAN
from router.moe.routed import StepRouted


def step_routed(chunks: Sequence[ScheduledChunk]) -> StepRouted | None:
    """Return the record of a step's experts, ``None`` if no request asks for any.

    All requests that ask use one model, so they have one shape.
    """
    asked = [routed for chunk in chunks if (routed := chunk.sequence.request.routed) is not None]
    if not asked:
        return None
    num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
    shape, dtype = asked[0].shape, asked[0].dtype
    has_forced = any(routed.forced for routed in asked)
    forced = _forced(chunks, num_tokens, shape) if has_forced else None
    return StepRouted(num_tokens, *shape, dtype, forced)


def _forced(
    chunks: Sequence[ScheduledChunk], num_tokens: int, shape: tuple[int, int]
) -> np.ndarray:
    """Return the forced ids int64 [L, S, K] of a step, -1 for tokens that choose freely."""
    num_layers, top_k = shape
    forced = np.full((num_layers, num_tokens, top_k), -1, np.int64)
    first = 0
    for chunk in chunks:
        routed = chunk.sequence.request.routed
        if routed is not None and routed.forced:
            rows = np.frombuffer(routed.forced, LITTLE_ENDIAN[routed.dtype]).reshape(-1, *shape)
            some = rows[chunk.start : chunk.end]
            forced[:, first : first + len(some)] = some.swapaxes(0, 1)
        first += chunk.end - chunk.start
    return forced


def with_rows(
    emissions: Iterable[Emission],
    chunks: Iterable[ScheduledChunk],
    routed: StepRouted,
    identity: str,
) -> list[Emission]:
    """Return a step's emissions with the rows of the chunks' computed tokens.

    Rows come with the last event of their choice, or before its first token in an event of their
    own. Rows that a resumed request already has are not sent again. A parked sequence gets none:
    its chunk is recomputed. ``identity`` is the model's.
    """
    found = list(emissions)
    failed, place_of = set(), {}
    for place, emission in enumerate(found):
        if isinstance(emission.outcome, TokenEvent):
            place_of[emission.request_id, emission.outcome.index] = place
        else:
            failed.add(emission.request_id)
    first = 0
    for chunk in chunks:
        sequence, request = chunk.sequence, chunk.sequence.request
        row = first - chunk.start  # token 0's row, if the step had the whole sequence
        first += chunk.end - chunk.start
        start = max(chunk.start, request.num_routed_of(sequence.index))
        end = min(chunk.end, sequence.num_computed)
        asks = request.routed is not None and request.routed.returned
        if not asks or start >= end or sequence.awaited or request.request_id in failed:
            continue
        place = place_of.get((request.request_id, sequence.index), len(found))
        if place == len(found):
            event = TokenEvent(sequence.index, (), exact=sequence.exact, identity=identity)
            found.append(Emission(request.request_id, event))
        found[place] = _with(found[place], routed.packed(row + start, row + end), start)
    return found


def _with(emission: Emission, rows: bytes, start: int) -> Emission:
    """Return an event's emission with rows that begin at the choice's row ``start``."""
    if not isinstance(emission.outcome, TokenEvent):
        return emission
    return replace(emission, outcome=replace(emission.outcome, routed=rows, routed_start=start))
