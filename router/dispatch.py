"""Dispatch: send each token's row to the actors that hold its experts, and bring the rows back.

One frame per actor per layer. Where an actor is dead, hung, overloaded or under another placement,
its frame alone is built again from the then-current placement and sent again, until the deadline;
calls are pure, so that is safe. Runs on the engine's thread.

Dimension letters: T tokens, K experts per token, H hidden size, P = T*K pairs.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import Code, ExpertUnavailableError, FrameError, InternalError
from cluster.frames import DispatchFrame, ErrorFrame, RowsFrame, decode, encode
from cluster.placement import Placement
from cluster.retry import RetryPolicy
from cluster.tensors import dtype_name, from_raw, to_raw
from cluster.transport import Call, CallFailure, Outcome, Transport
from router.placement_view import PlacementView

MAX_WAIT_S = 0.5
BACKOFF = RetryPolicy(first_delay_s=0.02, max_delay_s=0.2)
"""Between attempts where every expert has a copy; without one, a new placement is waited for."""

logger = logging.getLogger("expertmesh.dispatch")


@dataclass(frozen=True, slots=True)
class _Share:
    """Experts ``start:end`` of a layout; ``actor_id`` is ``None`` where they have no live copy."""

    actor_id: str | None
    generation: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """One layer's experts in an order in which those of one actor stand together.

    ``expert_ids[place_of[e]] == e``.
    """

    place_of: np.ndarray
    expert_ids: list[int]
    shares: tuple[_Share, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """The share of one actor in a layer: which pairs it computes, grouped by expert."""

    actor_id: str
    generation: int
    expert_ids: tuple[int, ...]
    counts: tuple[int, ...]
    pairs: np.ndarray


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's work. Pair t * K + r is token t with the expert that the gate put at rank r.

    ``rows`` [T, H] and ``output`` [P, H] are raw values (:func:`cluster.tensors.to_raw`);
    ``slots`` [P] says where in the output a pair's row belongs.
    """

    layer_id: int
    rows: np.ndarray
    expert_ids: np.ndarray
    k: int
    slots: np.ndarray
    output: np.ndarray
    dtype: str
    deadline_s: float


class Dispatcher:
    """Dispatches the layers of one model; one per router replica, used by one thread."""

    def __init__(
        self,
        model: str,
        view: PlacementView,
        transport: Transport,
        suspect: Callable[[str, int], None],
        call_timeout_s: float,
    ) -> None:
        """``suspect`` is told (actor_id, generation) of an actor that did not answer."""
        self._model = model
        self._view = view
        self._transport = transport
        self._suspect = suspect
        self._call_timeout_s = call_timeout_s
        self._request_ids = itertools.count(1)
        self._laid_out: Placement | None = None
        self._layouts: dict[int, _Layout] = {}
        self.retries: Counter[str] = Counter()

    def dispatch(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: np.ndarray,
        slots: np.ndarray,
        deadline_s: float,
    ) -> torch.Tensor:
        """Return the experts' unweighted rows [P, H] for hidden states [T, H].

        Pair t * K + r is token t with expert ``topk_ids[t, r]``, the gate's choices as they are
        [T, K]; its row stands at ``slots[t * K + r]``. An expert gets its rows by rank, then by
        token, as transformers' eager experts do, since a row's bits depend on its place in the
        product. Raises :class:`ExpertUnavailableError` when not every share could be had before
        ``deadline_s`` (wall clock).
        """
        rows = to_raw(hidden_states)
        layer = _Layer(
            layer_id=layer_id,
            rows=rows,
            expert_ids=topk_ids.ravel(),
            k=topk_ids.shape[1],
            slots=slots,
            output=np.empty((topk_ids.size, rows.shape[1]), rows.dtype),
            dtype=dtype_name(hidden_states.dtype),
            deadline_s=deadline_s,
        )
        pending = np.arange(topk_ids.size)
        failures = 0
        while True:
            placement = self._placement(deadline_s)
            layout = self._layout(placement, layer_id)
            ordered, parts, homeless = split(layout, layer.expert_ids, layer.k, pending)
            failed = self._attempt(placement, layer, ordered, parts)
            if not failed and not homeless:
                return from_raw(layer.output, layer.dtype).to(hidden_states.device)
            self._wait(placement, bool(homeless), deadline_s, failures)
            pending = np.concatenate([*homeless, *failed])
            failures += 1

    def _placement(self, deadline_s: float) -> Placement:
        placement = self._view.current()
        if placement is None and self._view.wait_newer(None, max(0.0, deadline_s - time.time())):
            placement = self._view.current()
        if placement is None:
            raise ExpertUnavailableError("no placement is known yet", self._model, 1.0)
        return placement

    def _layout(self, placement: Placement, layer_id: int) -> _Layout:
        """Return the layer's layout; kept for as long as the placement lasts."""
        if self._laid_out is not placement:
            self._laid_out, self._layouts = placement, {}
        layout = self._layouts.get(layer_id)
        if layout is None:
            holders = {
                key.expert_id: actors[0] if actors else None
                for key, actors in placement.holders.items()
                if (key.model, key.layer_id) == (self._model, layer_id)
            }
            layout = self._layouts[layer_id] = lay_out(holders, placement.generations)
        return layout

    def _attempt(
        self, placement: Placement, layer: _Layer, ordered: np.ndarray, parts: Sequence[_Part]
    ) -> list[np.ndarray]:
        """Send every part once and take the answers; return the pairs that got none."""
        now_s = time.time()
        timeout_s = min(self._call_timeout_s, layer.deadline_s - now_s)
        if timeout_s <= 0:
            raise ExpertUnavailableError(
                "the experts of a layer did not answer in time", self._model, 1.0
            )
        if not parts:
            return []
        # All parts' rows at once; each part's are a piece of them.
        rows = layer.rows.take(ordered // layer.k, axis=0).data.cast("B")
        row_bytes = len(rows) // len(ordered)
        frames, calls = [], []
        begin = 0
        for part in parts:
            end = begin + len(part.pairs) * row_bytes
            frame = DispatchFrame(
                request_id=next(self._request_ids),
                epoch=placement.epoch,
                placement_version=placement.version,
                model=self._model,
                layer_id=layer.layer_id,
                expert_ids=part.expert_ids,
                num_tokens_per_expert=part.counts,
                dtype=layer.dtype,
                hidden_size=layer.rows.shape[1],
                deadline_s=now_s + timeout_s,
                rows=rows[begin:end],
            )
            frames.append(frame)
            calls.append(Call(part.actor_id, part.generation, encode(frame)))
            begin = end
        outcomes = self._transport.begin(calls, timeout_s).wait()
        return [
            part.pairs
            for part, frame, outcome in zip(parts, frames, outcomes, strict=True)
            if not self._take(layer, part, frame, outcome)
        ]

    def _take(self, layer: _Layer, part: _Part, sent: DispatchFrame, outcome: Outcome) -> bool:
        if isinstance(outcome, CallFailure):
            self.retries[outcome.value] += 1
            self._suspect(part.actor_id, part.generation)
            return False
        try:
            answer = decode(outcome)
        except FrameError as error:
            logger.warning("%s g%d answered: %s", part.actor_id, part.generation, error)
            self.retries["malformed"] += 1
            return False
        if isinstance(answer, ErrorFrame):
            return self._refused(part, answer)
        expected = (sent.request_id, sent.dtype, len(part.pairs), sent.hidden_size)
        if not isinstance(answer, RowsFrame) or expected != (
            answer.request_id,
            answer.dtype,
            answer.num_rows,
            answer.hidden_size,
        ):
            logger.warning("%s g%d: the answer is not the call's", part.actor_id, part.generation)
            self.retries["malformed"] += 1
            return False
        received = np.frombuffer(answer.rows, layer.output.dtype)
        layer.output[layer.slots[part.pairs]] = received.reshape(len(part.pairs), -1)
        return True

    def _refused(self, part: _Part, answer: ErrorFrame) -> bool:
        """Count a refusal that trying again can mend; raise for one that it cannot."""
        if answer.error.code is Code.INVALID_ARGUMENT:
            logger.error("%s refused a frame: %s", part.actor_id, answer.error)
            raise InternalError("an expert actor refused a frame as malformed")
        self.retries[answer.kind] += 1
        return False

    def _wait(self, placement: Placement, homeless: bool, deadline_s: float, failures: int) -> None:
        """Wait for another placement: long where an expert has no copy, else a moment."""
        remaining_s = deadline_s - time.time()
        if remaining_s <= 0:
            raise ExpertUnavailableError(
                "an expert has no live copy that answers in time", self._model, 1.0
            )
        wait_s = MAX_WAIT_S if homeless else BACKOFF.delay_s(failures, random.random())
        self._view.wait_newer(placement, min(wait_s or 0.0, remaining_s))


def lay_out(holders: Mapping[int, str | None], generations: Mapping[str, int]) -> _Layout:
    """Order a layer's experts by holder, those without one first, then by id.

    ``holders`` has every expert of the layer.
    """
    expert_ids = sorted(holders, key=lambda expert_id: (holders[expert_id] or "", expert_id))
    place_of = np.empty(len(expert_ids), dtype=np.int64)
    place_of[expert_ids] = np.arange(len(expert_ids))
    shares = []
    start = 0
    for actor_id, group in itertools.groupby(expert_ids, key=lambda e: holders[e]):
        end = start + len(list(group))
        generation = 0 if actor_id is None else generations[actor_id]
        shares.append(_Share(actor_id, generation, start, end))
        start = end
    return _Layout(place_of, expert_ids, tuple(shares))


def split(
    layout: _Layout, expert_ids: np.ndarray, k: int, pairs: np.ndarray
) -> tuple[np.ndarray, list[_Part], list[np.ndarray]]:
    """Divide pairs among actors: by expert, then by rank, then by token.

    ``expert_ids`` [P] has the expert of every pair of the layer. Returns the pairs that have an
    actor, in order; the parts, each a stretch of it; and those whose experts have no live copy.
    """
    places = layout.place_of[expert_ids[pairs]]
    # A pair's number is its token's times k plus its rank.
    keys = (places * k + pairs % k) * len(expert_ids) + pairs
    ordered = pairs[keys.argsort()]
    counts = np.bincount(places, minlength=len(layout.expert_ids)).tolist()
    parts: list[_Part] = []
    homeless: list[np.ndarray] = []
    end = first = 0
    for share in layout.shares:
        asked = [place for place in range(share.start, share.end) if counts[place]]
        if not asked:
            continue
        sizes = tuple(counts[place] for place in asked)
        begin, end = end, end + sum(sizes)
        if share.actor_id is None:  # the first share, if there is such
            homeless.append(ordered[begin:end])
            first = end
            continue
        asked_ids = tuple(layout.expert_ids[place] for place in asked)
        parts.append(_Part(share.actor_id, share.generation, asked_ids, sizes, ordered[begin:end]))
    return ordered[first:], parts, homeless
