"""Exchanges a layer with its actors in two native calls: one sends, one receives and combines.

In a step of few tokens a layer spends most of its time in Python, which finds the processor's
caches evicted by the products. So native code (``native/wire/exchange.c``) does the steps of
:mod:`router.moe.dispatch` in one go: it orders the pairs, encodes and sends frames; then receives,
decodes, checks and sums. Frames and sums are the same, byte for byte. It handles the common case:
rows are float32 or bfloat16, each expert has one copy, and its actor's connection is idle and needs
neither TLS nor a checksum. In any other case (a late answer, an error, a lost connection or a sum
that is not finite) :meth:`router.moe.dispatch.Dispatcher.take_over` continues where native code
stopped.

Dimension letters: T tokens, K experts per token, P = T x K pairs, E experts, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.native import native
from cluster.placement.placement import Placement
from cluster.spec import FRAME_VERSION
from cluster.transport.base import Call, PendingCalls
from cluster.transport.stream.client import PROMPT_S, StreamCalls, StreamTransport
from cluster.transport.stream.lanes import IdleConnections, take_over
from cluster.wire.frames import DTYPE_CODES
from cluster.wire.tensors import MicrobatchBuffers, dtype_name
from router.control.heard import HeardActors
from router.moe.combine import NATIVE
from router.moe.gate import Choice
from router.moe.pace import Actor, LatencyTracker, note_heard
from router.moe.permute import Layout, LayoutCache

if TYPE_CHECKING:  # the workshop computes layers without Ray, which the view imports
    from router.control.placement_view import PlacementView

MAX_PAIRS = 512
"""In a layer with more pairs, products take nearly all of the time."""
MOST = 32, 4096, 64, 259
"""Other limits of native code: actors, experts, K, bytes of a layer's number and its model."""
WAIT_MS = 5
"""The longest that native code waits for one actor."""
MAX_LATE, PAUSE_LAYERS = 3, 50
"""After this many native calls in a row that could not finish, Python does this many layers."""
_HEADER_BYTES = 64
"""An upper bound on an answer message's bytes besides its rows."""
Kind = tuple[torch.dtype, torch.dtype, int]
"""The dtypes of rows and weights, and K."""


@dataclass(frozen=True, slots=True, eq=False)
class NativeLayer:
    """A layer under one placement and set of connections; ``fields`` are for native code."""

    placement: Placement
    lanes: IdleConnections
    layout: Layout
    actors: tuple[Actor, ...]
    most_pairs: int
    fields: tuple[object, ...]


@dataclass(slots=True, eq=False)
class NativeLayerCall:
    """A layer that native code has sent: hidden states [T, H] by the gate's choice [T, K].

    ``left`` and ``received`` are numbers of bytes by the actors that were asked, where native code
    could not go on (:func:`cluster.transport.stream.lanes.take_over`).
    """

    transport: StreamTransport
    layer: NativeLayer
    rows: torch.Tensor
    choice: Choice
    room: MicrobatchBuffers
    call_id: int
    request_id: int
    sent_at_s: float
    left: tuple[int, ...] | None
    received: tuple[int, ...] | None = None
    settle: Callable[[], None] = lambda: None
    """Has Python go on, before anything else is sent or waited for."""

    def go_on(self, calls: Sequence[Call]) -> PendingCalls:
        """Return the calls in the form that Python's transport continues with."""
        pending, nothing = StreamCalls(self.transport, calls, self.sent_at_s), (0,) * len(calls)
        numbers = self.left or nothing, self.received or nothing
        take_over(self.transport, self.layer.lanes, pending, self.call_id, *numbers)
        return pending


class Exchanges:
    """The native calls of one model's layers, one at a time; used by the dispatcher's thread.

    ``under_way`` is the call in flight, until it is received or Python takes it over.
    """

    def __init__(
        self,
        model: str,
        view: PlacementView,
        layouts: LayoutCache,
        transport: StreamTransport,
        call_timeout_s: float,
        request_ids: Iterator[int],
        pace: LatencyTracker,
        heard: HeardActors,
    ) -> None:
        """Take a dispatcher's parts; ``model`` is the model's key."""
        self._model = model
        self._view = view
        self._layouts = layouts
        self._transport = transport
        self._call_timeout_s = call_timeout_s
        self._request_ids = request_ids
        self._pace = pace
        self._heard = heard
        self.under_way: NativeLayerCall | None = None
        self._late = 0  # exchanges in a row that Python had to wait for
        self._layers: dict[
            int, tuple[Placement | None, IdleConnections, Kind, NativeLayer | None]
        ] = {}

    def send(
        self,
        layer_id: int,
        rows: torch.Tensor,
        choice: Choice,
        deadline_s: float,
        room: MicrobatchBuffers,
    ) -> NativeLayerCall | None:
        """Send hidden states [T, H] of the host to the experts of a choice, if native code can.

        ``deadline_s`` (monotonic) is the step's. ``room`` has the buffers of the step's only
        microbatch. Rows and choice must stay unchanged until the call is over.
        """
        if self.under_way is not None:
            self.under_way.settle()
        if self._late >= MAX_LATE:
            self._late = self._late + 1 if self._late < MAX_LATE + PAUSE_LAYERS else 0
            return None
        layer, num_pairs = self._layer(layer_id, rows, choice), choice.ids.size
        if layer is None or not 0 < num_pairs <= layer.most_pairs or choice.pairs is not None:
            return None
        sent_at_s = time.monotonic()
        left_s = deadline_s - sent_at_s
        if left_s < self._call_timeout_s and not self._is_patient(layer, num_pairs, left_s):
            return None
        call_id = self._transport.new_call_ids(len(layer.actors))
        request_id = next(self._request_ids)
        timeout_s = min(left_s, self._call_timeout_s)
        ids = call_id, request_id
        assert native is not None
        left = native.send_layer(
            room.bytes_of("rows", rows),
            choice.ids,
            layer.fields,
            layer.lanes.fields,
            *ids,
            timeout_s,
        )
        sent = NativeLayerCall(self._transport, layer, rows, choice, room, *ids, sent_at_s, left)
        self.under_way = sent
        return sent

    def receive(self, sent: NativeLayerCall) -> torch.Tensor | None:
        """Wait for the answers of the call in flight; return its weighted sums [T, H].

        They lie in its buffers. ``None`` if native code cannot finish the call.
        """
        layer = sent.layer
        if layer.lanes is not self._transport.lanes():
            return None
        begun_at_s = time.monotonic()
        room = sent.room
        sums = room.sums(sent.rows)
        assert native is not None
        asked, most_rows, has_waited, sent.received = native.receive_layer(
            sent.choice.ids,
            room.bytes_of("weights", sent.choice.weights),
            room.bytes_of("sums", sums),
            layer.fields,
            layer.lanes.fields,
            sent.call_id,
            sent.request_id,
            WAIT_MS,
        )
        if sent.received is not None:
            self._late += 1
            return None
        self._late, self.under_way = 0, None
        now_s = time.monotonic()
        actors = [actor for bit, actor in enumerate(layer.actors) if asked >> bit & 1]
        for actor_id, generation in actors:
            note_heard(self._heard, actor_id, generation, now_s)
        is_known = has_waited or begun_at_s - sent.sent_at_s <= PROMPT_S
        self._pace.note(most_rows, now_s - sent.sent_at_s if is_known else None, actors)
        self._transport.calls["stream"] += len(actors)
        return sums

    def _is_patient(self, layer: NativeLayer, num_rows: int, left_s: float) -> bool:
        """Return whether the step's time left covers the longest that any actor may take.

        Its part may have any number of rows, up to ``num_rows``.
        """
        sizes = [1 << bit for bit in range(num_rows.bit_length())]
        return all(
            left_s >= self._pace.answer_timeout_s(*actor, size)
            for actor in layer.actors
            for size in sizes
        )

    def _layer(self, layer_id: int, rows: torch.Tensor, choice: Choice) -> NativeLayer | None:
        """Return a layer in native code's form, rebuilt if it is out of date."""
        placement, lanes = self._view.placement, self._transport.lanes()
        kind = rows.dtype, choice.weights.dtype, choice.ids.shape[1]
        kept = self._layers.get(layer_id)
        if kept is None or kept[0] is not placement or kept[1] is not lanes or kept[2] != kind:
            layer = None
            if placement is not None and self._layouts.has_model(placement):
                layer = self._made(placement, lanes, kind, layer_id, rows)
            kept = self._layers[layer_id] = placement, lanes, kind, layer
        return kept[3]

    def _made(
        self,
        placement: Placement,
        lanes: IdleConnections,
        kind: Kind,
        layer_id: int,
        rows: torch.Tensor,
    ) -> NativeLayer | None:
        """Return a layer in native code's form; ``None`` if native code cannot take it."""
        layout = self._layouts.fixed(placement, layer_id)
        if layout is None or self._layouts.missing(placement, layer_id) is not None:
            return None
        actors = tuple((str(holder.actor_id), holder.generation) for holder in layout.holders)
        name = layer_id.to_bytes(4, "little") + self._model.encode()
        sizes = len(actors), len(layout.ordered_ids), kind[2], len(name)
        if (
            any(size > most for size, most in zip(sizes, MOST, strict=True))
            or kind[:2] not in NATIVE
            or not all(actor in lanes.index_of for actor in actors)
        ):
            return None
        lane_of = np.array([lanes.index_of[actor] for actor in actors], np.int64)
        size, dtype = rows.shape[1], DTYPE_CODES[dtype_name(rows.dtype)]
        fields = layout.ordered_ids, layout.ends, lane_of, name, kind[2], size, dtype
        room = lanes.least_bytes - _HEADER_BYTES
        most_pairs = min(MAX_PAIRS, room // (size * rows.itemsize))
        return NativeLayer(placement, lanes, layout, actors, most_pairs, (*fields, FRAME_VERSION))
