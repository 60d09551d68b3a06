"""Steps in pieces: the router attends one piece while the experts compute another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import ExpertUnavailableError, NotFiniteError
from cluster.native import native
from cluster.staging import RING
from cluster.transport.base import Call, CallFailure, IsGone, Outcome, never_gone
from cluster.wire.frames import DispatchFrame
from router.config.capacity import CapacityConfig
from router.engine import batch
from router.engine.batch import MIN_PIECE_TOKENS, pack, piece_ends
from router.engine.scheduling.scheduler import Limits
from router.engine.sequence import ScheduledChunk
from router.messages.request import GenerationRequest
from router.model.attention.interface import Span
from router.model.decoder import MAX_PIECES
from router.moe.layer import InFlightLayer
from tests.emulated_device import emulated_device
from tests.emulated_steps import Steps
from tests.local_cluster import Answered, LocalCluster, greedy_request
from tests.unit.router.engine.conftest import ALL, OpenCluster, Saves
from tests.unit.router.engine.test_batch import sequence_of
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = Limits(32, 64, 256)
PROMPTS = [prompt_of(length, length) for length in (5, 90, 17, 2, 41)]
PROMPT = prompt_of(40, 1)
LENGTH = 6
ERRORS = [("float32", 1e-5), ("bfloat16", 0.02)]
if native is not None:
    ERRORS = [(dtype, 0.0) for dtype, _ in ERRORS]


@pytest.fixture
def open_cluster(open_cluster: OpenCluster, monkeypatch: pytest.MonkeyPatch) -> OpenCluster:
    """Open clusters that cut steps of few tokens too."""
    monkeypatch.setattr(batch, "MIN_PIECE_TOKENS", 4)
    return open_cluster


def requests(name: str = "r", **options: Any) -> list[GenerationRequest]:
    return [
        greedy_request(f"{name}{i}", prompt, LENGTH, **options) for i, prompt in enumerate(PROMPTS)
    ]


def tokens_of(cluster: LocalCluster, most_pieces: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the requests' tokens, and the number of pieces of each step."""
    cluster.engine._most_pieces = most_pieces
    counts = []
    forward = cluster.model.decoder.forward

    def counted(token_ids: Any, positions: Any, pieces: Sequence[Any], *others: Any) -> Any:
        counts.append(len(pieces))
        return forward(token_ids, positions, pieces, *others)

    cluster.model.decoder.forward = counted
    try:
        events = cluster.generate(*requests(f"{most_pieces}/"))
    finally:
        cluster.model.decoder.forward = forward
    return [event.token_ids for [event] in events], counts


# The decision.


@given(st.integers(1, 3000), st.integers(0, 600), st.integers(1, 5))
def test_pieces_are_long_enough_and_the_first_has_all_decodes(
    num_prefill: int, num_decode: int, most_pieces: int
) -> None:
    num_tokens = num_prefill + num_decode
    ends = piece_ends(num_tokens, num_decode, most_pieces)
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    assert sum(sizes) == num_tokens
    assert len(sizes) <= most_pieces
    assert len(sizes) == 1 or min(sizes) >= MIN_PIECE_TOKENS
    assert sizes[0] >= num_decode
    if num_decode * most_pieces <= num_tokens:
        assert len(sizes) == max(1, min(most_pieces, num_tokens // MIN_PIECE_TOKENS))
        assert max(sizes) - min(sizes) <= 1 or len(sizes) > 2


@pytest.mark.parametrize(
    ("num_tokens", "num_decode", "ends"),
    [(256, 0, [128, 256]), (512, 32, [256, 512]), (512, 400, [512]), (512, 300, [300, 512])],
)
def test_decodes_and_short_steps_are_one_piece(
    num_tokens: int, num_decode: int, ends: list[int]
) -> None:
    assert piece_ends(num_tokens, num_decode, MAX_PIECES) == ends


def test_rows_on_the_host_last_until_their_piece_is_finished() -> None:
    """Between them come as many copies to the host as there are other pieces."""
    assert MAX_PIECES <= RING


class Spans:
    """An attention whose view is the spans, and the number of decodes."""

    page_size = 16
    is_independent = True

    def view(self, spans: Sequence[Span], num_decode: int) -> Any:
        return list(spans), num_decode


def test_a_chunk_goes_on_in_the_next_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "piece_ends", lambda *_: [4, 5, 9])
    # a decodes; b prefills tokens 2..6 of 8, c all of 4.
    a = sequence_of("a", [1, 2, 3], [0], 2)
    b, c = sequence_of("b", list(range(8)), [1], 2), sequence_of("c", list(range(4)), [2])
    step = pack(
        [ScheduledChunk(b, 2, 6), ScheduledChunk(a, 2, 3), ScheduledChunk(c, 0, 4)], Spans(), 3
    )
    assert [piece.tokens for piece in step.pieces] == [slice(0, 4), slice(4, 5), slice(5, 9)]
    found = [
        ([(span.slots.tolist(), span.start) for span in spans], num_decode)
        for spans, num_decode in (piece.batch.view for piece in step.pieces)
    ]
    page = [list(range(16 * i, 16 * i + 16)) for i in range(3)]
    assert found == [
        ([(page[0][:3], 2), (page[1][:5], 2)], 1),
        ([(page[1][:6], 5)], 0),
        ([(page[2][:4], 0)], 0),
    ]
    new_slots = [slot for piece in step.pieces for slot in piece.batch.new_slots.tolist()]
    assert new_slots == [2, 18, 19, 20, 21, 32, 33, 34, 35]


# Same results.


@pytest.mark.parametrize("dtype", ["float32"] if native is None else ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL)
def test_pieces_change_no_familys_tokens(
    saved: Saves, open_cluster: OpenCluster, family: str, dtype: str
) -> None:
    folder = saved(family).folder
    cluster = open_cluster(folder, limits=LIMITS, dtype=dtype, prefix_cache=False)
    expected, counts = tokens_of(cluster, 1)
    assert set(counts) == {1}
    for most_pieces in (2, 3):
        tokens, counts = tokens_of(cluster, most_pieces)
        assert counts.count(most_pieces) >= 2  # prefills beside decodes, too
        assert counts[-1] == 1
        assert tokens == expected


@pytest.fixture(scope="module")
def windowed(saved: Saves) -> dict[str, LocalCluster]:
    """A cluster of each type, whose steps a test computes."""
    folder = saved("mixtral", sliding_window=7).folder
    return {
        dtype: LocalCluster(folder, threaded=False, dtype=dtype, prefix_cache=False)
        for dtype, _ in ERRORS
    }


@pytest.mark.parametrize(("dtype", "error"), ERRORS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_borders_anywhere_change_no_bit(
    windowed: dict[str, LocalCluster], data: st.DataObject, dtype: str, error: float
) -> None:
    """Without native code torch rounds otherwise where a chunk has another size."""
    logits = []
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=4)))
    cluster = windowed[dtype]
    for ends in ([40], [*cuts, 40]):
        for i, length in enumerate((23, 17)):
            cluster.scheduler.add(greedy_request(f"r{i}", prompt_of(length, i), 4))
        work = cluster.scheduler.schedule()
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(batch, "piece_ends", lambda *_, ends=ends: ends)
            logits.append(cluster.forward(pack(work, cluster.model.attention)))
        for sequence in [*cluster.scheduler.running]:
            cluster.scheduler.finish(sequence)
    assert (logits[1] - logits[0]).abs().max() <= error * logits[0].abs().max()


def test_a_device_copies_once_each_way_for_each_piece_and_layer(open_cluster: OpenCluster) -> None:
    expected, _ = tokens_of(open_cluster(limits=LIMITS), 1)
    with emulated_device() as device:
        cluster = open_cluster(limits=LIMITS, device=device.device)
        steps = Steps(cluster, device)
        tokens, counts = tokens_of(cluster, MAX_PIECES)
        cluster.close()
    assert tokens == expected
    assert MAX_PIECES in counts
    num_layers = len(cluster.checkpoint.shape.layers)
    for found, count in zip(steps.copies, counts, strict=True):
        assert len(found.to_host) == len(found.to_device) == count * num_layers + 1
        assert not found.host_reads
        assert not found.mixed


# Overlap.


class Log(Answered):
    """Calls that note when they are waited for, or dropped."""

    def __init__(self, outcomes: list[Outcome], name: int, events: list[tuple[str, int]]) -> None:
        super().__init__(outcomes)
        self._name, self._events = name, events

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        self._events.append(("wait", self._name))
        return self.outcomes

    def drop(self) -> None:
        self._events.append(("drop", self._name))


def logged(cluster: LocalCluster) -> list[tuple[str, int]]:
    """Return a list to which the transport appends what it is asked for."""
    events: list[tuple[str, int]] = []
    send = cluster.transport.send

    def noted(calls: Sequence[Call]) -> Log:
        name = sum(kind == "send" for kind, _ in events)
        events.append(("send", name))
        return Log(send(calls).outcomes, name, events)

    cluster.transport.send = noted
    return events


@pytest.fixture
def stepped(open_cluster: OpenCluster) -> LocalCluster:
    """A cluster whose engine has a long prompt, and does a step when told to."""
    cluster = open_cluster(threaded=False)
    cluster.scheduler.add(greedy_request("r", PROMPT, LENGTH))
    return cluster


def test_a_piece_is_sent_before_the_piece_before_is_waited_for(stepped: LocalCluster) -> None:
    events = logged(stepped)
    stepped.engine.step(stepped.scheduler.schedule())
    # Layers 0 and 1: pieces 0 and 1, 2 and 3. Layer 2: only the second has a token to sample from.
    expected = [("send", 0), ("send", 1)]
    for number in range(2):
        expected += [("wait", number), ("send", number + 2)]
    assert events == [*expected, ("wait", 2), ("wait", 3), ("send", 4), ("wait", 4)]


def test_a_step_that_fails_drops_the_calls_under_way(stepped: LocalCluster) -> None:
    events = logged(stepped)
    finish, failures = stepped.layers.finish, iter([False, False, True])

    def fails(begun: InFlightLayer) -> torch.Tensor:
        if next(failures):
            raise ExpertUnavailableError("a fault of the test's", "", 1.0)
        return finish(begun)

    stepped.layers.finish = fails
    stepped.engine._isolation.compute(stepped.scheduler.schedule())
    assert events[-1] == ("drop", 3)
    assert [number for kind, number in events if kind == "wait"] == [0, 1]
    stepped.engine._flush()
    with pytest.raises(ExpertUnavailableError, match="a fault of the test's"):
        stepped.result(greedy_request("r", [1], 1))


@pytest.mark.parametrize("method", ["prepare", "combine"])
def test_a_layer_that_fails_after_it_is_sent_drops_its_calls(
    stepped: LocalCluster, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = logged(stepped)

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(stepped.layers._combination, method, fails)
    with pytest.raises(MemoryError):
        stepped.engine.step(stepped.scheduler.schedule())
    sent = [number for kind, number in events if kind == "send"]
    assert [number for kind, number in events if kind == "drop"] == sent


# Failures amid a layer in pieces.


def frames_of(cluster: LocalCluster, layer_id: int) -> list[DispatchFrame]:
    return [frame for frame in cluster.transport.frames if frame.layer_id == layer_id]


@pytest.mark.parametrize("contract", ["strict", "drop", "next_expert"])
def test_an_expert_that_is_lost_between_two_pieces(
    open_cluster: OpenCluster, contract: str
) -> None:
    """The second piece of layer 1 finds the placement without the expert."""
    [[expected]] = open_cluster().generate(greedy_request("r", PROMPT, LENGTH))
    cluster = open_cluster()
    cluster.engine._most_pieces = 2

    def lose(call: Call, number: int) -> None:
        if len(frames_of(cluster, 1)) == 2:  # both actors have the first piece's
            cluster.transport.fail = lambda call, number: None
            cluster.lose([(1, 3)])

    cluster.transport.fail = lose
    request = greedy_request("r", PROMPT, LENGTH, on_expert_loss=contract)
    cluster.engine.submit(request)
    if contract == "strict":
        while not cluster.scheduler.parked():
            pass
        cluster.lose([])
    [event] = cluster.result(request)
    assert event.exact == (contract == "strict")
    assert len(event.token_ids) == LENGTH
    if contract == "strict":
        assert event.token_ids == expected.token_ids
        assert not cluster.engine.inexact_rows
    else:
        assert cluster.engine.inexact_rows[contract] > 0


def test_a_work_that_one_piece_leaves_out_is_left_out_of_all(open_cluster: OpenCluster) -> None:
    """The expert is away until the deadline; the other request's tokens come all the same."""
    plain, used = open_cluster(), list[set[int]]()
    for count, prompt in ((1, PROMPT[:20]), (LENGTH, prompt_of(2, 8)), (1, PROMPT)):
        before = len(frames_of(plain, 1))
        [[alone]] = plain.generate(greedy_request(f"{len(prompt)}", prompt, count))
        used.append({e for frame in frames_of(plain, 1)[before:] for e in frame.expert_ids})
    lost = min(used[0] - used[1])
    cluster = open_cluster(num_actors=8, threaded=False)
    cluster.engine._most_pieces = 2
    long = greedy_request("long", PROMPT, LENGTH, timeout_s=0.3)
    for request in (long, greedy_request("other", prompt_of(2, 8), LENGTH)):
        cluster.scheduler.add(request)
    is_away = [True]

    def away(call: Call, number: int) -> CallFailure | None:
        frame = cluster.transport.frames[-1]
        is_hit = is_away[0] and frame.layer_id == 1 and lost in frame.expert_ids
        return CallFailure.TIMED_OUT if is_hit else None

    cluster.transport.fail = away
    cluster.engine.step(cluster.scheduler.schedule())
    waiting, going = cluster.scheduler.running
    assert waiting.awaited == {(1, lost)}
    assert (waiting.num_computed, waiting.num_generated) == (0, 0)
    assert going.num_generated == 1
    # Layer 2 got a row of the other request alone, that which is sampled from.
    assert sum(frame.num_rows for frame in frames_of(cluster, 2)) == 2
    is_away[0] = False
    waiting.awaited = frozenset()
    cluster.engine.step(cluster.scheduler.schedule())
    assert waiting.num_generated == 1
    assert tuple(waiting.token_ids[-1:]) == alone.token_ids


@pytest.mark.parametrize("poisoned", range(3))
def test_rows_that_are_not_finite_end_their_own_request(
    open_cluster: OpenCluster, monkeypatch: pytest.MonkeyPatch, poisoned: int
) -> None:
    prompts = [[t for t in prompt_of(30, i) if t != 7] for i in range(3)]
    prompts[poisoned].append(7)
    cluster = open_cluster(limits=Limits(8, 256, 16), threaded=False)
    cluster.engine._most_pieces = 4
    decoder = cluster.model.decoder
    embed = decoder._embedding

    def damaged(token_ids: torch.Tensor) -> torch.Tensor:
        return torch.where((token_ids == 7).unsqueeze(1), torch.nan, embed(token_ids))

    monkeypatch.setattr(decoder, "_embedding", damaged)
    asked = [greedy_request(f"r{i}", prompt, 1) for i, prompt in enumerate(prompts)]
    for request in asked:
        cluster.scheduler.add(request)
    cluster.engine.step(cluster.scheduler.schedule())
    cluster.engine._flush()
    with pytest.raises(NotFiniteError):
        cluster.result(asked.pop(poisoned))
    for request in asked:
        [event] = cluster.result(request)
        assert len(event.token_ids) == 1


def test_with_a_capacity_a_step_is_one_piece(open_cluster: OpenCluster) -> None:
    cluster = open_cluster(capacity=CapacityConfig(tokens=4), limits=LIMITS)
    counts = tokens_of(cluster, cluster.engine._most_pieces)[1]
    assert set(counts) == {1}
    assert sum(cluster.overflow.values()) > 0
