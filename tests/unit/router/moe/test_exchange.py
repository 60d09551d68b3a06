"""A layer's exchange in native code: the sums and frames of Python, and what is left to Python."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import OverloadedError
from cluster.native import native
from cluster.placement.placement import empty_placement
from cluster.spec import FRAME_VERSION, ModelExperts
from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.transport.stream.server import StreamServer
from cluster.wire.frames import (
    Buffer,
    Buffers,
    DispatchFrame,
    ErrorFrame,
    RowsFrame,
    decode,
    encode,
)
from cluster.wire.tensors import from_bytes, to_bytes
from router.control.placement_view import PlacementView
from router.moe import exchange
from router.moe.combine import WeightedSums
from router.moe.dispatch import Dispatcher
from router.moe.exchange import MAX_LATE, PAUSE_LAYERS, WAIT_MS
from router.moe.gate import Choice
from router.moe.layer import MoELayers, StepContext
from tests.cluster_fixture import wait_until

MODEL, HIDDEN, NUM_EXPERTS, LIMIT_S = "m", 64, 8, 60.0
PATIENT_MS = 1000
"""The longest wait that native code takes."""
EXPERTS = ModelExperts(MODEL, (0, 3), NUM_EXPERTS, 1)
Answer = Callable[[DispatchFrame, RowsFrame], Buffers]


def good(frame: DispatchFrame, rows: RowsFrame) -> Buffers:
    return encode(rows)


class Arithmetic:
    """An actor whose expert e maps a row to e + 2 times itself; ``answer`` may spoil it."""

    def __init__(self) -> None:
        self.frames: list[DispatchFrame] = []
        self.raw: list[bytes] = []
        self.answer: Answer = good
        self.server = StreamServer(self._answers, "127.0.0.1", None)

    def _answers(self, data: Sequence[Buffer]) -> Iterable[Buffers]:
        for buffer in data:
            self.raw.append(bytes(buffer))
            frame = decode(bytes(buffer))
            assert isinstance(frame, DispatchFrame)
            self.frames.append(frame)
            rows = from_bytes(frame.rows, frame.dtype, frame.num_rows, frame.row_shape)
            factors = np.repeat(np.array(frame.expert_ids) + 2, frame.num_tokens_per_expert)
            results = rows * torch.from_numpy(factors).to(rows.dtype)[:, None]
            kind = frame.request_id, frame.num_rows, frame.row_shape, frame.dtype
            yield self.answer(frame, RowsFrame(*kind, (to_bytes(results),)))


class Router:
    """The layers of a router over such actors, by native exchanges and by Python's dispatch."""

    def __init__(self, num_actors: int, is_copied: bool = False) -> None:
        """Each actor has its share of the experts, or all if they are copied."""
        self.actors = {f"a{i}": Arithmetic() for i in range(num_actors)}
        placement = empty_placement(1, [EXPERTS])
        keys = EXPERTS.expert_keys()
        for index, actor_id in enumerate(self.actors):
            own = [key for key in keys if is_copied or key.expert_id % num_actors == index]
            placement = placement.with_actor(actor_id, 1, own)
        self.view = PlacementView()
        self.view.publish(placement)
        self.transport = StreamTransport(Connector(self._offer, None), None)
        self.suspects: list[str] = []
        self.dispatcher = Dispatcher(
            MODEL, self.view, self.transport, lambda a, g: self.suspects.append(a), 10.0
        )
        self.native = MoELayers(self.dispatcher, WeightedSums())
        self.python = MoELayers(self.dispatcher, WeightedSums())
        self.python._exchanges = None
        self.taken_over = 0
        self.was_taken_over = threading.Event()
        take_over = self.dispatcher.take_over

        def counted(*given: object) -> object:
            self.taken_over += 1
            self.was_taken_over.set()
            return take_over(*given)

        self.dispatcher.take_over = counted
        wait_until(self._is_ready, "streams are there", LIMIT_S)

    def _is_ready(self) -> bool:
        # Each is asked, so that all connect at once.
        return {self.transport.is_ready(actor, 1) for actor in self.actors} == {True}

    def _offer(self, actor: str, generation: int, network: Network, left_s: float) -> StreamOffer:
        return self.actors[actor].server.offer(Network.UNIX)

    def late(self, frame: DispatchFrame, rows: RowsFrame) -> Buffers:
        """Answer once Python has taken the exchange over, however busy the machine is."""
        assert self.was_taken_over.wait(LIMIT_S)
        return encode(rows)

    def frames(self) -> list[DispatchFrame]:
        return [frame for actor in self.actors.values() for frame in actor.frames]

    def close(self) -> None:
        self.transport.close()
        for actor in self.actors.values():
            actor.server.close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    # A thread that waits for its turn on a busy machine is no late actor.
    monkeypatch.setattr(exchange, "WAIT_MS", PATIENT_MS)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    waits_ms = {True: WAIT_MS, False: PATIENT_MS}
    return lambda is_impatient: monkeypatch.setattr(exchange, "WAIT_MS", waits_ms[is_impatient])


@pytest.fixture
def router() -> Iterator[Router]:
    made = Router(2)
    yield made
    made.close()


def choice_of(num_tokens: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Choice:
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.randn(num_tokens, NUM_EXPERTS, generator=generator).softmax(-1).topk(k)
    return Choice(ids.numpy(), weights.to(dtype))


def rows_of(num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.fixture
def asked(router: Router) -> tuple[torch.Tensor, Choice, torch.Tensor]:
    """Rows, a choice of all experts, and the sums that they have by Python's dispatch."""
    rows, choice = rows_of(4), choice_of(4, 8)
    return rows, choice, sums(router.python, rows, choice)


Asked = tuple[torch.Tensor, Choice, torch.Tensor]


def begin(layers: MoELayers, rows: torch.Tensor, choice: Choice, left_s: float = 60.0) -> object:
    context = StepContext(time.monotonic() + left_s, [1] * len(rows), ["strict"] * len(rows))
    return layers.begin(context, 3, rows, choice)


def sums(
    layers: MoELayers, rows: torch.Tensor, choice: Choice, left_s: float = 60.0
) -> torch.Tensor:
    return layers.finish(begin(layers, rows, choice, left_s)).clone()


def by_hand(rows: torch.Tensor, choice: Choice) -> torch.Tensor:
    factors = torch.from_numpy(choice.ids) + 2
    weighted = rows[:, None].double() * (factors * choice.weights.double())[:, :, None]
    return weighted.sum(1)


@pytest.mark.parametrize("num_actors", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (1, 2), (2, 8), (33, 3), (64, 8)])
def test_frames_and_sums_are_those_of_python(num_actors: int, num_tokens: int, k: int) -> None:
    router = Router(num_actors)
    try:
        for dtype, weights_dtype in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        ):
            rows, choice = rows_of(num_tokens, dtype), choice_of(num_tokens, k, 1, weights_dtype)
            expected = sums(router.python, rows, choice)
            asked = {actor: a.raw[-1] for actor, a in router.actors.items() if a.raw}
            for actor in router.actors.values():
                actor.raw.clear()
            got = sums(router.native, rows, choice)
            assert torch.equal(got, expected)
            error = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(got.double(), by_hand(rows, choice), rtol=error, atol=error)
            for actor_id, actor in router.actors.items():
                for raw in actor.raw:
                    assert timeless(raw) == timeless(asked[actor_id])
                    assert b"".join(encode(decode(raw))) == raw
        assert router.taken_over == 0
    finally:
        router.close()


def timeless(raw: bytes) -> DispatchFrame:
    """Return a frame but for its request and the time that is left."""
    frame = decode(raw)
    assert isinstance(frame, DispatchFrame)
    return frame._replace(request_id=0, time_left_s=0.0)


def test_counters_and_pace_know_exchanges(router: Router) -> None:
    for seed in range(20):
        sums(router.native, rows_of(4), choice_of(4, 2, seed))
    assert router.transport.calls["stream"] == len(router.frames())
    assert router.dispatcher._pace.stall_s(4) < float("inf")
    assert router.dispatcher._heard.ages().keys() == router.actors.keys()


def test_a_late_answer_is_waited_for_and_no_frame_is_sent_twice(
    router: Router, asked: Asked, impatient: Callable[[bool], None]
) -> None:
    rows, choice, expected = asked
    for slow in router.actors.values():
        slow.answer = router.late
        router.was_taken_over.clear()
        impatient(True)
        before, taken_over = len(router.frames()), router.taken_over
        assert torch.equal(sums(router.native, rows, choice), expected)
        assert len(router.frames()) == before + 2
        assert router.taken_over == taken_over + 1
        slow.answer = good
        impatient(False)
        assert torch.equal(sums(router.native, rows, choice), expected)
        assert router.taken_over == taken_over + 1


def test_an_answer_in_parts_is_put_together(router: Router, asked: Asked) -> None:
    rows, choice, expected = asked
    for actor in router.actors.values():
        for peer in actor.server._peers:
            send = peer.channel.send

            def slowly(call_id: int, buffers: Buffers, send: Any = send, peer: Any = peer) -> bool:
                theirs, ours = socket.socketpair()
                with theirs, ours:
                    peer.channel._fd, kept = theirs.fileno(), peer.channel._fd
                    assert send(call_id, buffers)
                    peer.channel._fd = kept
                    whole = ours.recv(1 << 20)
                for begin_at in range(0, len(whole), 100):
                    peer.channel.sock.send(whole[begin_at : begin_at + 100])
                    threading.Event().wait(0.001)
                return True

            peer.channel.send = slowly
    for _ in range(3):
        assert torch.equal(sums(router.native, rows, choice), expected)


SPOILED: dict[str, Answer] = {
    "overloaded": lambda frame, rows: encode(
        ErrorFrame(frame.request_id, "OverloadedError", OverloadedError("full", "queue", 0.01))
    ),
    "another request": lambda frame, rows: encode(rows._replace(request_id=rows.request_id + 1)),
    "fewer rows": lambda frame, rows: encode(
        rows._replace(num_rows=1, rows=(b"".join(rows.rows)[: HIDDEN * 4],))
    ),
    "no frame": lambda frame, rows: (b"nothing that is known",),
    "too long for a stream": lambda frame, rows: (),
    "not finite": lambda frame, rows: encode(
        rows._replace(rows=(np.full(rows.num_rows * HIDDEN, np.nan, np.float32).tobytes(),))
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_answer_is_asked_for_again(
    router: Router, asked: Asked, impatient: Callable[[bool], None], kind: str
) -> None:
    impatient(True)  # native code waits for the rest of a short answer
    rows, choice, expected = asked
    for actor in router.actors.values():
        left = [1]

        def once(frame: DispatchFrame, rows: RowsFrame, left: list[int] = left) -> Buffers:
            return SPOILED[kind](frame, rows) if left and left.pop() else encode(rows)

        actor.answer = once
        assert torch.equal(sums(router.native, rows, choice), expected)
        assert not left
        actor.answer = good
        wait_until(router._is_ready, "streams are there", LIMIT_S)
        assert torch.equal(sums(router.native, rows, choice), expected)
    assert router.taken_over


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_broken_connection_costs_a_repetition(router: Router, asked: Asked, when: str) -> None:
    rows, choice, expected = asked
    for number, actor in enumerate(router.actors.values(), 1):
        begun = begin(router.native, rows, choice) if when == "between" else None
        wait_until(lambda a=actor: len(a.server._peers) == 1, "one router", LIMIT_S)
        [peer] = actor.server._peers
        peer.channel.shut_down()
        if begun is None:
            begun = begin(router.native, rows, choice)
        assert torch.equal(router.native.finish(begun), expected)
        if when == "before":  # between, the answer may have come before the connection broke
            assert router.taken_over == number
        wait_until(router._is_ready, "streams are there", LIMIT_S)
        assert torch.equal(sums(router.native, rows, choice), expected)


def test_a_full_socket_gets_the_rest_of_a_frame_later(router: Router) -> None:
    rows, choice = rows_of(60), choice_of(60, 8)
    expected = sums(router.python, rows, choice)
    held = threading.Event()
    for actor in router.actors.values():
        actor.answer = lambda frame, rows: (held.wait(LIMIT_S), encode(rows))[1]
    for link in router.transport.links.values():
        link.channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    begun = begin(router.native, rows, choice)
    assert router.taken_over == 1  # not all of it went into the sockets
    held.set()
    assert torch.equal(router.native.finish(begun), expected)


def test_an_abandoned_layer_costs_the_next_nothing(router: Router, asked: Asked) -> None:
    rows, choice, expected = asked
    for _ in range(5):
        router.native.abandon(begin(router.native, rows_of(2), choice_of(2, 4)))
        assert torch.equal(sums(router.native, rows, choice), expected)


def test_layers_that_are_begun_together_get_their_own_sums(router: Router) -> None:
    questions = [(rows_of(n), choice_of(n, 3, n)) for n in (1, 2, 5, 9)]
    expected = [sums(router.python, *question) for question in questions]
    begun = [begin(router.native, *question) for question in questions]
    got = [router.native.finish(one) for one in begun]
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("first", [0, 1])
def test_layers_of_either_kind_may_be_finished_in_any_order(router: Router, first: int) -> None:
    one, other = (rows_of(4), choice_of(4, 1, 5)), (rows_of(3), choice_of(3, 8, 6))
    expected = sums(router.python, *one), sums(router.python, *other)
    began_at_s = time.monotonic()
    begun = begin(router.python, *one), begin(router.native, *other)
    kinds = router.python, router.native
    for index in (first, 1 - first):
        assert torch.equal(kinds[index].finish(begun[index]), expected[index])
    # Two that share a dispatcher, both native.
    second = MoELayers(router.dispatcher, WeightedSums())
    begun = begin(router.native, *one), begin(second, *other)
    kinds = router.native, second
    for index in (first, 1 - first):
        assert torch.equal(kinds[index].finish(begun[index]), expected[index])
    assert time.monotonic() - began_at_s < LIMIT_S  # no answer was dropped
    assert not router.dispatcher.retries


def test_after_late_answers_python_has_some_layers(
    router: Router, asked: Asked, impatient: Callable[[bool], None]
) -> None:
    rows, choice, expected = asked
    for actor in router.actors.values():
        actor.answer = router.late
    impatient(True)
    for _ in range(MAX_LATE):
        router.was_taken_over.clear()
        assert torch.equal(sums(router.native, rows, choice), expected)
    impatient(False)
    for _ in range(2 * MAX_LATE):
        assert torch.equal(sums(router.native, rows, choice), expected)
    assert router.taken_over == MAX_LATE
    for actor in router.actors.values():
        actor.answer = good
    for _ in range(PAUSE_LAYERS):
        assert torch.equal(sums(router.native, rows, choice), expected)
    before = router.dispatcher.exchanges._layers[3][3]
    sums(router.native, rows, choice)
    assert router.dispatcher.exchanges._late == 0
    # What Python sends between does not have a layer made anew.
    sums(router.python, rows, choice)
    sums(router.native, rows, choice)
    assert router.dispatcher.exchanges._layers[3][3] is before


def test_an_actor_that_takes_longer_than_other_copies_is_found_out_and_asked_for_less() -> None:
    router = Router(4, is_copied=True)
    try:
        for actor_id, actor in router.actors.items():

            def slowly(
                frame: DispatchFrame, rows: RowsFrame, is_slow: bool = actor_id == "a3"
            ) -> Buffers:
                threading.Event().wait(0.002 * (5 if is_slow else 1) * len(frame.expert_ids))
                return encode(rows)

            actor.answer = slowly

        def is_found_and_spared() -> bool:
            for actor in router.actors.values():
                actor.frames.clear()
            for _ in range(20):
                sums(router.python, rows_of(16), choice_of(16, 4))
            rows = [sum(f.num_rows for f in actor.frames) for actor in router.actors.values()]
            measured = router.dispatcher.times.slowness(time.monotonic())
            slowest = max(measured, key=lambda actor: measured[actor], default=None)
            return slowest == ("a3", 1) and rows[3] < 0.7 * min(rows[:3])

        wait_until(is_found_and_spared, "the slow actor is found", LIMIT_S)
    finally:
        router.close()


def test_the_actor_that_answered_last_is_asked_first_by_both_ways(router: Router) -> None:
    for _ in range(3):
        sums(router.native, rows_of(4), choice_of(4, 8))
    order = router.transport.lanes().fields[2]
    links = list(router.transport.links.values())
    router.transport._changes += 1
    assert router.transport.lanes().fields[2] == order
    assert [link.last_answer for link in links] == list(order)[:-1]
    assert router.transport._answers == order[-1] == max(order)


def test_only_what_native_code_knows_is_sent_by_it(router: Router) -> None:
    exchanges = router.dispatcher.exchanges
    assert exchanges is not None
    sent: list[bool] = []
    send = exchanges.send
    exchanges.send = lambda *given: (sent.append((one := send(*given)) is not None), one)[1]
    sums(router.native, rows_of(4), choice_of(4, 2))
    assert sent == [True]
    assert sums(router.native, rows_of(300), choice_of(300, 2)).shape == (300, HIDDEN)
    assert sum(sent) == 1  # too many pairs
    sums(router.native, rows_of(4).half(), choice_of(4, 2))
    assert sum(sent) == 1  # float16 is summed by torch
    few = choice_of(4, 2)
    few.pairs = np.arange(6)
    context = StepContext(time.monotonic() + 60, [1] * 4, ["drop"] * 4)
    assert exchanges.send(3, rows_of(4), few, context.deadline_s, context.room(slice(None))) is None
    sums(router.native, rows_of(4), choice_of(4, 2), left_s=0.01)
    assert sum(sent) == 1  # an actor may take longer than the step has
    pieces = StepContext(time.monotonic() + 60, [8], ["strict"])
    first = router.native.begin(pieces, 3, rows_of(4), choice_of(4, 2), None, slice(0, 4))
    second = router.native.begin(pieces, 3, rows_of(4), choice_of(4, 2), None, slice(4, 8))
    assert torch.equal(router.native.finish(first), router.native.finish(second))
    assert sum(sent) == 1  # pieces
    sums(router.native, rows_of(4), choice_of(4, 2))
    assert sum(sent) == 2


def test_a_new_placement_is_followed(router: Router) -> None:
    rows, choice = rows_of(4), choice_of(4, 8)
    expected = sums(router.native, rows, choice)
    begun = begin(router.native, rows, choice)
    placement = empty_placement(2, [EXPERTS]).with_actor("a1", 1, EXPERTS.expert_keys())
    router.view.publish(placement)
    assert torch.equal(router.native.finish(begun), expected)
    router.actors["a0"].frames.clear()
    assert torch.equal(sums(router.native, rows, choice), expected)
    assert not router.actors["a0"].frames


def test_other_layers_and_other_numbers_of_experts_take_turns(router: Router) -> None:
    for k in (2, 3, 2, 8, 1):
        rows, choice = rows_of(3), choice_of(3, k, k)
        assert torch.equal(sums(router.native, rows, choice), sums(router.python, rows, choice))


def fields() -> tuple[list[Any], list[Any]]:
    """Return the good arguments of both functions, over a socket whose peer is silent."""
    ids, numbers = np.array([[0, 1]], np.int64), (2, HIDDEN, 1, FRAME_VERSION)
    layer = (np.arange(4), np.array([2, 4]), np.array([0, 1]), b"\0\0\0\0m", *numbers)
    fds = np.array([-1, -1], np.int32)
    lanes = (fds, (memoryview(bytearray(4096)),) * 2, np.zeros(3, np.int64))
    return (
        [bytes(HIDDEN * 4), ids, layer, lanes, 1, 1, 1.0],
        [ids, bytes(8), bytearray(HIDDEN * 4), layer, lanes, 1, 1, 1],
    )


WRONG_LAYERS = [
    *((0, np.array(ids, np.int64)) for ids in ([0, 1, 2, 9], [])),
    *((1, np.array(ends, np.int64)) for ends in ([3, 2], [2, 5], [4], [2, 3], [])),
    *((2, np.array(lanes)) for lanes in ([0, 2], [-1, 1])),
    *((3, name) for name in (b"m", b"0000" + bytes(256))),
    *((4, k) for k in (0, 3, 65)),
    *((5, size) for size in (0, 1 << 21)),
    (6, 3),
]
WRONG_LANES = [(0, np.zeros(1, np.int32)), (1, (bytearray(8),)), (2, np.zeros(2, np.int64))]
WRONG_IDS = [
    *(np.array([ids]) for ids in ([0, 4], [-1, 0])),
    *(np.zeros(shape, np.int64) for shape in ((257, 2), (0, 2), 3)),
]
WRONG_OTHERS: list[list[tuple[int, Any]]] = [
    [(0, bytes(HIDDEN * 4 - 1))],
    [(1, bytes(7)), (2, bytearray(3)), (7, -1), (7, 1 << 20)],
]


@pytest.mark.parametrize("which", [0, 1], ids=["send", "receive"])
def test_wrong_arguments_are_refused(which: int) -> None:
    assert native is not None
    function, good = (native.send_layer, native.receive_layer)[which], fields()[which]

    def changed(values: Sequence[Any], index: int, value: object) -> tuple[Any, ...]:
        return (*values[:index], value, *values[index + 1 :])

    function(*good)  # what it cannot send or receive is told, and no error
    wrong: list[tuple[int, Any]] = [*WRONG_OTHERS[which], *((1 - which, ids) for ids in WRONG_IDS)]
    for at, several in ((2 + which, WRONG_LAYERS), (3 + which, WRONG_LANES)):
        wrong += [(at, changed(good[at], *change)) for change in several]
    for change in wrong:
        with pytest.raises((ValueError, TypeError)):
            print(change, function(*changed(good, *change)))


def test_a_small_buffer_takes_no_answer() -> None:
    assert native is not None
    arguments = fields()[1]
    lanes = arguments[4]
    arguments[4] = (lanes[0], (memoryview(bytearray(50)),) * 2, lanes[2])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        lanes[0][:] = ours.fileno()
        theirs.send(bytes(2000))
        *_, received = native.receive_layer(*arguments)
    assert received == (0,)
