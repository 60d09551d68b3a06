"""Dispatch: send each token's row to the actors that hold its experts, and bring the rows back.

One frame per actor per layer. Where an actor is dead, hung, overloaded or under another placement,
its frame alone is built again from the then-current placement and sent again, until the deadline;
calls are pure, so that is safe. Runs on the engine's thread.

Dimension letters: T tokens, K experts per token, H hidden size, P = T*K pairs.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import Code, ExpertUnavailableError, FrameError, InternalError
from cluster.frames import DispatchFrame, ErrorFrame, RowsFrame, decode, encode
from cluster.placement import Placement
from cluster.tensors import dtype_name, from_bytes, to_bytes
from cluster.transport import Call, CallFailure, Outcome, Transport
from router.placement_view import PlacementView

BACKOFF_S = 0.02
MAX_WAIT_S = 0.5

logger = logging.getLogger("expertmesh.dispatch")


@dataclass(frozen=True, slots=True)
class _Part:
    """The share of one actor in a layer: which pairs it computes, grouped by expert."""

    actor_id: str
    generation: int
    expert_ids: tuple[int, ...]
    counts: tuple[int, ...]
    pairs: np.ndarray


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
        self._holders_of: Placement | None = None
        self._holders_by_layer: dict[int, tuple[list[str], np.ndarray]] = {}
        self.retries: Counter[str] = Counter()

    def dispatch(
        self,
        layer_id: int,
        hidden_states: torch.Tensor,
        topk_ids: np.ndarray,
        ranks: np.ndarray,
        deadline_s: float,
    ) -> torch.Tensor:
        """Return the experts' unweighted rows [T, K, H] for hidden states [T, H].

        ``topk_ids`` [T, K] must ascend along K; row (t, r) of the result is expert
        ``topk_ids[t, r]`` applied to token t. ``ranks`` [T, K] says where the gate had that expert:
        an expert gets its rows by rank, then by token, as transformers' eager experts do, since a
        row's bits depend on its place in the product. Raises :class:`ExpertUnavailableError` when
        not every share could be had before ``deadline_s`` (wall clock).
        """
        num_tokens, k = topk_ids.shape
        flat_ids = topk_ids.ravel()
        rows = torch.empty(
            (num_tokens * k, hidden_states.shape[1]),
            dtype=hidden_states.dtype,
            device=hidden_states.device,
        )
        # Pairs by expert, then by rank, then by token.
        pending = np.argsort(flat_ids * k + ranks.ravel(), kind="stable")
        while True:
            placement = self._placement(deadline_s)
            parts, homeless = self._split(placement, layer_id, flat_ids, pending)
            failed = self._attempt(placement, layer_id, hidden_states, k, parts, rows, deadline_s)
            if not failed and not len(homeless):
                return rows.view(num_tokens, k, -1)
            self._wait(placement, bool(len(homeless)), deadline_s)
            left = np.concatenate([homeless, *failed])
            # By expert again: another placement may bring together what was apart.
            pending = left[np.argsort(flat_ids[left], kind="stable")]

    def _placement(self, deadline_s: float) -> Placement:
        placement = self._view.current()
        if placement is None and self._view.wait_newer(None, max(0.0, deadline_s - time.time())):
            placement = self._view.current()
        if placement is None:
            raise ExpertUnavailableError("no placement is known yet", self._model, 1.0)
        return placement

    def _split(
        self, placement: Placement, layer_id: int, flat_ids: np.ndarray, pairs: np.ndarray
    ) -> tuple[list[_Part], np.ndarray]:
        """Divide the pairs (grouped by expert) among actors; also return those without a holder."""
        actor_ids, holder_of = self._holders(placement, layer_id)
        expert_of_pair = flat_ids[pairs]
        holder_of_pair = holder_of[expert_of_pair]
        num_pairs = np.bincount(expert_of_pair, minlength=len(holder_of)).tolist()
        shares: dict[int, list[int]] = {}
        for expert_id, holder in enumerate(holder_of.tolist()):
            if num_pairs[expert_id]:
                shares.setdefault(holder, []).append(expert_id)
        homeless = pairs[:0]
        parts = []
        for holder, expert_ids in shares.items():
            own = pairs if len(shares) == 1 else pairs[holder_of_pair == holder]
            if holder < 0:
                homeless = own
                continue
            actor_id = actor_ids[holder]
            counts = tuple(num_pairs[expert_id] for expert_id in expert_ids)
            generation = placement.generations[actor_id]
            parts.append(_Part(actor_id, generation, tuple(expert_ids), counts, own))
        return parts, homeless

    def _holders(self, placement: Placement, layer_id: int) -> tuple[list[str], np.ndarray]:
        """Return the actors, and for each expert of the layer its holder's place among them.

        An expert without a copy has -1. Kept per layer for as long as the placement lasts.
        """
        if self._holders_of is not placement:
            self._holders_of, self._holders_by_layer = placement, {}
        known = self._holders_by_layer.get(layer_id)
        if known is None:
            actor_ids = sorted(placement.generations)
            places = {actor_id: place for place, actor_id in enumerate(actor_ids)}
            holders = {
                key.expert_id: places[actors[0]] if actors else -1
                for key, actors in placement.holders.items()
                if (key.model, key.layer_id) == (self._model, layer_id)
            }
            holder_of = np.array([holders[expert_id] for expert_id in range(len(holders))])
            known = self._holders_by_layer[layer_id] = (actor_ids, holder_of)
        return known

    def _attempt(
        self,
        placement: Placement,
        layer_id: int,
        hidden_states: torch.Tensor,
        k: int,
        parts: Sequence[_Part],
        rows: torch.Tensor,
        deadline_s: float,
    ) -> list[np.ndarray]:
        """Send every part once; fill ``rows`` from the answers, return the pairs that got none."""
        timeout_s = min(self._call_timeout_s, deadline_s - time.time())
        if timeout_s <= 0:
            raise ExpertUnavailableError(
                "the experts of a layer did not answer in time", self._model, 1.0
            )
        frames = [
            self._frame(placement, layer_id, hidden_states, k, part, time.time() + timeout_s)
            for part in parts
        ]
        calls = [
            Call(part.actor_id, part.generation, encode(frame))
            for part, frame in zip(parts, frames, strict=True)
        ]
        outcomes = self._transport.begin(calls, timeout_s).wait()
        return [
            part.pairs
            for part, frame, outcome in zip(parts, frames, outcomes, strict=True)
            if not self._take(part, frame, outcome, rows)
        ]

    def _frame(
        self,
        placement: Placement,
        layer_id: int,
        hidden_states: torch.Tensor,
        k: int,
        part: _Part,
        deadline_s: float,
    ) -> DispatchFrame:
        index = part.pairs // k  # the token of each pair
        used = np.zeros(hidden_states.shape[0], dtype=bool)
        used[index] = True
        sent = hidden_states
        if not used.all():
            sent = hidden_states.index_select(0, torch.from_numpy(np.flatnonzero(used)))
            index = (np.cumsum(used) - 1)[index]
        return DispatchFrame(
            request_id=next(self._request_ids),
            epoch=placement.epoch,
            placement_version=placement.version,
            model=self._model,
            layer_id=layer_id,
            expert_ids=part.expert_ids,
            num_tokens_per_expert=part.counts,
            dtype=dtype_name(sent.dtype),
            num_rows=sent.shape[0],
            hidden_size=sent.shape[1],
            deadline_s=deadline_s,
            row_index=index.astype("<i4").tobytes(),
            rows=to_bytes(sent),
        )

    def _take(self, part: _Part, sent: DispatchFrame, outcome: Outcome, rows: torch.Tensor) -> bool:
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
        received = from_bytes(answer.rows, answer.dtype, answer.num_rows, answer.hidden_size)
        if not rows.is_cpu:
            received = received.to(rows.device)
        rows.index_copy_(0, torch.from_numpy(part.pairs), received)
        return True

    def _refused(self, part: _Part, answer: ErrorFrame) -> bool:
        """Count a refusal that trying again can mend; raise for one that it cannot."""
        if answer.error.code is Code.INVALID_ARGUMENT:
            logger.error("%s refused a frame: %s", part.actor_id, answer.error)
            raise InternalError("an expert actor refused a frame as malformed")
        self.retries[answer.kind] += 1
        return False

    def _wait(self, placement: Placement, homeless: bool, deadline_s: float) -> None:
        """Wait for another placement: long where an expert has no copy, else a moment."""
        remaining_s = deadline_s - time.time()
        if remaining_s <= 0:
            raise ExpertUnavailableError(
                "an expert has no live copy that answers in time", self._model, 1.0
            )
        longest_s = MAX_WAIT_S if homeless else BACKOFF_S
        self._view.wait_newer(placement, min(longest_s, remaining_s))
