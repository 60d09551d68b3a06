"""The engine of a mixture's router, over experts in this process: the served path without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ExpertFailedError,
    ExpertMeshError,
    ExpertUnavailableError,
    InvalidRequestError,
    ModelReplacedError,
    PoisonedRequestError,
)
from cluster.placement.placement import Placement, assign_experts, empty_placement
from cluster.spec import ON_EXPERT_LOSS, ExpertKey, ModelExperts
from cluster.transport.base import Call, CallFailure
from cluster.wire.frames import DispatchFrame, RowsFrame, decode, encode
from experts.backends.load import load_mixture_expert
from experts.bank import ExpertBank
from experts.checkpoint.mixture import Mixture, open_mixture
from router.control.placement_view import PlacementView
from router.messages.prediction import PredictionReply, PredictionRequest
from router.mixture import engine as engine_module
from router.mixture.engine import MixtureEngine
from router.mixture.gate import MixtureGate
from router.mixture.gather import GatherRows, answer_shape_of
from router.mixture.queue import Outcome, QueueLimits, WorkQueue
from router.mixture.replica import row_costs
from router.moe.dispatch import Dispatcher
from router.moe.layer import MoELayers
from router.moe.permute import PlacedModel
from router.moe.shared_load import SharedLoad
from tests.local_cluster import BankTransport
from tests.local_mixture import LocalMixture
from tests.mixtures import NUM_FEATURES, save_given, save_sequences, save_tree, save_unlike

MODEL, IDENTITY = "m@1", "the identity"
LIMITS = QueueLimits(step_requests=32, step_rows=64, requests=64, rows=4096)
WAIT_S = 60.0
Inputs = Mapping[str, np.ndarray]


@dataclass
class Router:
    mixture: Mixture
    engine: MixtureEngine
    view: PlacementView
    banks: dict[str, ExpertBank]
    transports: list[BankTransport]
    placement: Placement
    local: LocalMixture
    number: int = 0

    def submit(
        self,
        inputs: Inputs,
        timeout_s: float = WAIT_S,
        on_expert_loss: str = "strict",
        outputs: Sequence[str] | None = None,
        request_id: str = "",
    ) -> Future[Outcome]:
        self.number += 1
        names = [output.name for output in self.mixture.spec.outputs]
        future: Future[Outcome] = Future()
        request = PredictionRequest(
            request_id or f"r{self.number}",
            "m",
            inputs,
            tuple(names if outputs is None else outputs),
            time.monotonic() + timeout_s,
            on_expert_loss,
        )
        self.engine.submit(request, future.set_result)
        return future

    def predict(self, inputs: Inputs, **options: Any) -> PredictionReply:
        outcome = self.submit(inputs, **options).result(WAIT_S)
        if isinstance(outcome, ExpertMeshError):
            raise outcome
        return outcome

    def lose(self, *expert_ids: int) -> None:
        lost = {ExpertKey(MODEL, 0, expert_id) for expert_id in expert_ids}
        holders = {k: () if k in lost else a for k, a in self.placement.holders.items()}
        self._publish(replace(self.placement, holders=holders))

    def restore(self) -> None:
        self._publish(self.placement)

    def _publish(self, placement: Placement) -> None:
        assert self.view.placement is not None
        self.view.publish(replace(placement, version=self.view.placement.version + 1))

    @property
    def frames(self) -> list[Any]:
        return [frame for transport in self.transports for frame in transport.frames]


@contextmanager
def router_of(
    folder: Path,
    lanes: int = 3,
    num_banks: int = 3,
    limits: QueueLimits = LIMITS,
    fail: Callable[[Call, int], CallFailure | bytes | None] = lambda call, number: None,
    is_placed: bool = True,
) -> Iterator[Router]:
    mixture = open_mixture(folder)
    spec = mixture.spec
    experts = ModelExperts(MODEL, (0,), len(spec.experts), 1)
    shares = assign_experts([experts], [f"a{i}" for i in range(num_banks)], None)
    banks, placement = {}, empty_placement(1, [experts])
    for actor_id, keys in shares.items():
        bank = banks[actor_id] = ExpertBank()
        for key in keys:
            bank.hold(key, load_mixture_expert(mixture, key.expert_id))
        placement = placement.with_actor(actor_id, 1, keys)
    view = PlacementView()
    if is_placed:
        view.publish(placement)
    shape = partial(answer_shape_of, spec)
    load = SharedLoad(row_costs(mixture))
    transports = [BankTransport(banks, fail) for _ in range(lanes)]
    layers = [
        MoELayers(
            Dispatcher(MODEL, view, t, lambda a, g: None, 5.0, shape, load), GatherRows(shape)
        )
        for t in transports
    ]
    engine = MixtureEngine(
        spec,
        MixtureGate(mixture),
        PlacedModel(MODEL, view),
        layers,
        WorkQueue(limits, spec.rows_input.name),
        load,
        IDENTITY,
    )
    engine.start()
    try:
        local = LocalMixture(mixture)
        yield Router(mixture, engine, view, banks, transports, placement, local)
    finally:
        engine.close()
        assert not engine.is_alive()


def features(num_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(num_rows, NUM_FEATURES))}


def equal(reply: PredictionReply, expected: Mapping[str, np.ndarray]) -> None:
    assert reply.identity == IDENTITY
    assert reply.outputs.keys() == expected.keys()
    for name, array in expected.items():
        assert reply.outputs[name].dtype == array.dtype
        np.testing.assert_array_equal(reply.outputs[name], array)


def given(num_rows: int, expert: int, first: float = 0.0) -> dict[str, np.ndarray]:
    rows = np.zeros((num_rows, NUM_FEATURES))
    rows[:, 0] = first
    return {"x": rows, "expert": np.full((num_rows, 1), expert, np.int64)}


def replied(future: Future[Outcome]) -> PredictionReply:
    outcome = future.result(WAIT_S)
    assert isinstance(outcome, PredictionReply)
    return outcome


@pytest.fixture
def held() -> tuple[threading.Event, Callable[[Call, int], None]]:
    """Calls that wait for an event."""
    release = threading.Event()
    return release, lambda call, number: (release.wait(WAIT_S), None)[1]


Held = tuple[threading.Event, Callable[[Call, int], None]]


def test_predictions_of_experts_of_every_kind_are_those_of_one_process(tmp_path: Path) -> None:
    with router_of(save_unlike(tmp_path)) as router:
        for num_rows in (0, 1, 2, 64, 65, 200):
            inputs = features(num_rows, num_rows)
            reply = router.predict(inputs)
            assert reply.exact
            expected = router.local.predict(inputs)
            np.testing.assert_allclose(reply.outputs["value"], expected["value"], rtol=1e-12)
            np.testing.assert_array_equal(reply.outputs["experts"], expected["experts"])


def test_sequences_of_several_lengths_do_not_mix(tmp_path: Path) -> None:
    with router_of(save_sequences(tmp_path), lanes=2) as router:
        source = np.random.default_rng(1)
        asked = [
            {"x": source.normal(size=(rows, steps, 3)).astype(np.float32)}
            for rows, steps in [(1, 4), (3, 7), (2, 4), (70, 2), (1, 1)] * 3
        ]
        futures = [router.submit(inputs) for inputs in asked]
        for inputs, future in zip(asked, futures, strict=True):
            equal(replied(future), router.local.predict(inputs))


def test_a_tree_and_its_density_have_the_bits_of_one_process_alone_and_in_a_crowd(
    tmp_path: Path,
) -> None:
    with router_of(save_tree(tmp_path)) as router:
        sizes = [0, 1, 70, *(1 + i % 5 for i in range(40))]
        asked = [features(n, i) | {"y": np.ones((n, 1))} for i, n in enumerate(sizes)]
        expected = [router.local.predict(inputs) for inputs in asked]
        for inputs, outputs in zip(asked, expected, strict=True):
            equal(router.predict(inputs), outputs)
        futures = [router.submit(inputs) for inputs in asked]
        for future, outputs in zip(futures, expected, strict=True):
            equal(replied(future), outputs)
        without, names = {"x": asked[2]["x"]}, ["mean", "variance"]
        equal(router.predict(without, outputs=names), router.local.predict(without, names))


@pytest.mark.parametrize(
    ("save", "output", "top_k"),
    [
        *((partial(save_unlike, top_k=top_k), "value", top_k) for top_k in (1, 2, 3)),
        (save_tree, "mean", 3),  # both gates of the root, one leaf of the left, two of the right
    ],
    ids=["1", "2", "3", "tree"],
)
def test_k_of_the_experts_compute_a_row_and_no_more(
    tmp_path: Path, save: Callable[[Path], Path], output: str, top_k: int
) -> None:
    with router_of(save(tmp_path)) as router:
        router.predict(features(50), outputs=[output])
        rows = sum(sum(bank.tokens.values()) for bank in router.banks.values())
        assert rows == 50 * top_k


def among_mates(
    router: Router, release: threading.Event, mates: Sequence[Inputs], inputs: Inputs
) -> tuple[Outcome, list[PredictionReply]]:
    """Return the outcome of a request that waits beside others, and their replies.

    A first one holds the lane until ``release`` is set.
    """
    first = router.submit(given(1, 0))
    futures, own = [router.submit(mate) for mate in mates], router.submit(inputs)
    release.set()
    replied(first)
    return own.result(WAIT_S), [replied(future) for future in futures]


def test_an_expert_that_raises_fails_its_rows_and_no_others(tmp_path: Path, held: Held) -> None:
    release, hang = held
    with router_of(save_given(tmp_path, 3, fragile=True), lanes=1, fail=hang) as router:
        fragile = router.mixture.spec.expert_names.index("fragile")
        good, bad = given(3, fragile, 1.0), given(3, fragile, 0.5)
        failure, replies = among_mates(router, release, [good] * 4, bad)
        for reply in replies:
            equal(reply, router.local.predict(good))
        assert isinstance(failure, ExpertFailedError)
        assert failure.field == "fragile"
        assert "0.5" in failure.message


def test_rows_at_which_actors_die_end_their_request_after_four_of_them(tmp_path: Path) -> None:
    died: list[tuple[str, int]] = []
    with router_of(save_given(tmp_path, 3), lanes=1) as router:
        gate = threading.Event()

        def fail(call: Call, number: int) -> CallFailure | None:
            gate.wait(WAIT_S)
            placement = router.view.placement
            assert placement is not None
            generation = placement.generations[call.actor_id]
            if call.generation != generation:
                return CallFailure.DIED
            frame = decode(b"".join(call.frame))
            assert isinstance(frame, DispatchFrame)
            rows = np.frombuffer(bytes(frame.rows)).reshape(-1, NUM_FEATURES)
            if not (rows[:, 0] == 0.5).any():
                return None
            died.append((call.actor_id, generation))
            keys = [k for k, actors in placement.holders.items() if call.actor_id in actors]
            router.view.publish(placement.with_actor(call.actor_id, generation + 1, keys))
            return CallFailure.DIED

        router.transports[0].fail = fail
        failure, _ = among_mates(router, gate, [given(3, 1, 1.0)] * 4, given(3, 1, 0.5))
        assert isinstance(failure, PoisonedRequestError)
    assert [generation for _, generation in died] == [1, 2, 3, 4]


def test_a_step_that_raises_is_halved_until_the_request_at_fault_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, steps, choose = threading.Event(), [], MixtureGate.choose

    def checked(own: MixtureGate, inputs: Inputs, first_row: int) -> Any:
        gate.wait(WAIT_S)
        steps.append(len(inputs["x"]))
        if (inputs["x"][:, 0] == 0.5).any():
            raise RuntimeError("a fault of the test's")
        return choose(own, inputs, first_row)

    monkeypatch.setattr(MixtureGate, "choose", checked)
    with router_of(save_given(tmp_path, 3), lanes=1) as router:
        error, _ = among_mates(router, gate, [given(1, 1, 1.0)] * 7, given(1, 1, 0.5))
        assert isinstance(error, PoisonedRequestError)
        assert "cannot compute this request (RuntimeError)" in error.message
        assert len(steps) <= 1 + 1 + 2 * 4  # two steps of each halving of 9 requests


def test_a_router_that_cannot_compute_any_step_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended, choose = threading.Event(), MixtureGate.choose
    is_broken = False

    def checked(own: MixtureGate, inputs: Inputs, first_row: int) -> Any:
        if is_broken or (inputs["x"][:, 0] == 0.5).any():
            raise RuntimeError("a fault of the test's")
        return choose(own, inputs, first_row)

    monkeypatch.setattr(engine_module, "end_process", ended.set)
    monkeypatch.setattr(MixtureGate, "choose", checked)
    with router_of(save_given(tmp_path, 3), lanes=1) as router:
        router.predict(given(1, 1))
        for _ in range(5):  # however many such requests there are
            with pytest.raises(PoisonedRequestError):
                router.predict(given(1, 1, 0.5))
        router.predict(given(1, 1))
        assert not ended.is_set()
        is_broken = True
        with pytest.raises(PoisonedRequestError):
            router.predict(given(1, 1))
        assert ended.is_set()
    assert "the router exits: it cannot compute any step" in caplog.text


def test_a_choice_that_is_not_there_ends_its_own_request(tmp_path: Path) -> None:
    with router_of(save_given(tmp_path), lanes=1) as router:
        futures = [router.submit(given(2, e)) for e in (0, 8, -1, 7)]
        outcomes = [future.result(WAIT_S) for future in futures]
        assert [isinstance(o, PredictionReply) for o in outcomes] == [True, False, False, True]
        for outcome in outcomes[1:3]:
            assert isinstance(outcome, InvalidRequestError)
            assert outcome.field == "inputs.expert"
        inputs = given(150, 0)
        inputs["expert"][130] = 9
        with pytest.raises(InvalidRequestError, match="row 130"):
            router.predict(inputs)


@pytest.mark.parametrize(
    ("shape", "value"),
    [((2,), np.nan), ((NUM_FEATURES,), 0.0)],
    ids=["not finite", "as the rows, not as the outputs"],
)
def test_a_damaged_answer_is_asked_for_again(
    tmp_path: Path, shape: tuple[int, ...], value: float
) -> None:
    def damaged(call: Call, number: int) -> bytes | None:
        frame = decode(b"".join(call.frame))
        assert isinstance(frame, DispatchFrame)
        rows = np.full((frame.num_rows, *shape), value).tobytes()
        answer = RowsFrame(frame.request_id, frame.num_rows, shape, "float64", (rows,))
        return b"".join(encode(answer)) if number == 1 else None

    with router_of(save_given(tmp_path), lanes=1, fail=damaged) as router:
        equal(router.predict(given(4, 2, 1.0)), router.local.predict(given(4, 2, 1.0)))
        assert len(router.frames) == 2


def test_a_strict_request_waits_for_its_expert_and_others_go_on(tmp_path: Path) -> None:
    with router_of(save_given(tmp_path)) as router:
        router.lose(3)
        waiting = router.submit(given(100, 3, 1.0))
        equal(router.predict(given(5, 2, 1.0)), router.local.predict(given(5, 2, 1.0)))
        assert not waiting.done()
        router.restore()
        reply = replied(waiting)
        assert reply.exact
        equal(reply, router.local.predict(given(100, 3, 1.0)))


@pytest.mark.parametrize("contract", ["next_expert", "drop"])
def test_others_go_on_without_a_missing_expert_and_say_so(tmp_path: Path, contract: str) -> None:
    with router_of(save_unlike(tmp_path)) as router:
        inputs = features(60, 9)
        expected = router.local.predict(inputs)
        lost = int(expected["experts"][0, 0])
        router.lose(lost)
        reply = router.predict(inputs, on_expert_loss=contract)
        assert not reply.exact
        assert lost not in reply.outputs["experts"]
        untouched = ~(expected["experts"] == lost).any(axis=1)
        assert untouched.any()
        for name in expected:
            np.testing.assert_array_equal(reply.outputs[name][untouched], expected[name][untouched])
        counts = (reply.outputs["experts"][~untouched] >= 0).sum(axis=1)
        assert set(counts.tolist()) == ({2} if contract == "next_expert" else {1})
        assert router.engine.tally.inexact_rows == {contract: int((~untouched).sum())}
        # Rows whose expert is not missing are exact.
        kept = {"x": inputs["x"][untouched]}
        assert router.predict(kept, on_expert_loss=contract).exact


@pytest.mark.parametrize("contract", ON_EXPERT_LOSS)
def test_a_row_without_any_other_expert_ends_at_its_deadline_by_name(
    tmp_path: Path, contract: str
) -> None:
    with router_of(save_given(tmp_path)) as router:
        router.lose(3)
        with pytest.raises(ExpertUnavailableError, match="'e3' had no live copy") as caught:
            router.predict(given(2, 3), timeout_s=0.3, on_expert_loss=contract)
        assert caught.value.retry_after_s is not None


def test_a_request_ends_at_its_deadline_while_an_actor_hangs(tmp_path: Path, held: Held) -> None:
    release, hang = held
    with router_of(save_given(tmp_path), lanes=1, fail=hang) as router:
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            router.predict(given(1, 0), timeout_s=0.2)
        assert time.monotonic() - started_s < WAIT_S / 2
        release.set()
        equal(router.predict(given(1, 0)), router.local.predict(given(1, 0)))


def test_a_cancelled_request_ends_and_its_rows_are_not_computed(tmp_path: Path, held: Held) -> None:
    release, hang = held
    with router_of(save_given(tmp_path), lanes=1, fail=hang) as router:
        computed = router.submit(given(1, 0))
        waiting = router.submit(given(50, 1), request_id="gone")
        router.engine.cancel("gone")
        router.engine.cancel("unknown")
        assert isinstance(waiting.result(WAIT_S), CancelledRequestError)
        release.set()
        replied(computed)
        router.predict(given(1, 2))
        assert sum(frame.num_rows for frame in router.frames) == 2


def test_nothing_runs_before_a_placement_and_the_error_says_so(tmp_path: Path) -> None:
    with router_of(save_given(tmp_path), is_placed=False) as router:
        with pytest.raises(ExpertUnavailableError, match="no placement"):
            router.predict(given(1, 0), timeout_s=0.2)
        waiting = router.submit(given(1, 0))
        router.view.publish(router.placement)
        replied(waiting)


def test_a_replaced_mixture_ends_its_requests_with_a_hint(tmp_path: Path) -> None:
    with router_of(save_given(tmp_path)) as router:
        router.lose(3)
        waiting = router.submit(given(1, 3))
        other = ModelExperts("other@2", (0,), 1, 1)
        router.view.publish(empty_placement(2, [other]))
        outcome = waiting.result(WAIT_S)
        assert isinstance(outcome, ModelReplacedError)
        assert outcome.retry_after_s is not None


def test_requests_for_the_experts_of_idle_devices_overlap(tmp_path: Path) -> None:
    num_devices, asked = 8, set[str]()
    limits = replace(LIMITS, step_requests=1)  # each request has a lane
    all_asked = threading.Barrier(num_devices, timeout=WAIT_S)

    def wait(call: Call, number: int) -> None:
        asked.add(call.actor_id)
        all_asked.wait()

    with router_of(save_given(tmp_path), num_devices, num_devices, limits, wait) as router:
        for future in [router.submit(given(1, e)) for e in range(num_devices)]:
            replied(future)
    assert len(asked) == num_devices
