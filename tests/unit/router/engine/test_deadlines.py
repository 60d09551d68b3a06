"""Deadlines: a request ends between steps, and only its own waits are bounded by its time."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralForCausalLM

from cluster.errors import DeadlineExceededError, ExpertUnavailableError
from cluster.spec import Emulation
from cluster.transport.base import Call, CallFailure
from router.engine.sequence import ScheduledChunk
from router.messages.request import GenerationRequest, TokenEvent
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

NUM_EXPERTS = 32
"""So many that no short request needs them all."""
LENGTH, NEIGHBOUR = 8, 12
DAY_S = 86_400.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path, num_local_experts=NUM_EXPERTS)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )


@pytest.fixture
def cluster(folder: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(folder)
    yield cluster
    cluster.close()


def wait_out(request: GenerationRequest) -> None:
    """Return once a request's time is over."""
    threading.Event().wait(max(0.0, request.deadline_s - time.monotonic()))


def results(cluster: LocalCluster, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        cluster.result(request)


def steps_of_neighbour(folder: Path, timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the steps of a request beside 20 requests a second that have ``timeout_s`` each."""
    cluster = LocalCluster(folder, emulation=Emulation(0.004, 0.0))
    ended, stopped, num_steps = threading.Event(), threading.Event(), itertools.count()
    beside: list[GenerationRequest] = []
    compute = cluster.engine.step

    def step(chunks: list[ScheduledChunk], *trace: Any) -> None:
        if any(work.sequence.request.request_id == "neighbour" for work in chunks):
            next(num_steps)
        compute(chunks, *trace)

    def send() -> None:
        for number in itertools.count():
            if ended.wait(0.05):
                break
            beside.append(greedy_request(f"{number}", prompt_of(4, number), LENGTH, timeout_s))
            cluster.engine.submit(beside[-1])
        stopped.set()

    monkeypatch.setattr(cluster.engine, "step", step)
    try:
        threading.Thread(target=send, daemon=True).start()
        [[event]] = cluster.generate(greedy_request("neighbour", prompt_of(4, 99), NEIGHBOUR))
        ended.set()
        assert stopped.wait(60)
        assert len(event.token_ids) == NEIGHBOUR
        if timeout_s < 1:  # the fault has hit
            assert beside
            with pytest.raises(DeadlineExceededError):
                results(cluster, beside)
    finally:
        cluster.close()
    return next(num_steps)


@pytest.mark.parametrize("timeout_s", [0.25, 60.0])
def test_requests_with_little_time_cost_a_neighbour_no_step(
    folder: Path, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert steps_of_neighbour(folder, timeout_s, monkeypatch) == NEIGHBOUR


def test_a_step_that_outlasts_a_request_still_gives_its_batch_mate_a_token(
    folder: Path, plain: MixtralForCausalLM
) -> None:
    cluster = LocalCluster(folder, threaded=False)
    hasty = greedy_request("hasty", prompt_of(4, 1), LENGTH, timeout_s=0.2)
    mate = greedy_request("mate", prompt_of(4, 2), LENGTH)
    for request in (hasty, mate):
        cluster.engine.submit(request)
    cluster.engine._commands.run(0.0)
    cluster.transport.fail = lambda call, number: wait_out(hasty)
    cluster.engine.step(cluster.scheduler.schedule())
    asked = Counter((f.layer_id, e) for f in cluster.transport.frames for e in f.expert_ids)
    assert set(asked.values()) == {1}  # no layer was computed twice
    cluster.engine._expire()
    cluster.engine._flush()
    with pytest.raises(DeadlineExceededError):
        cluster.result(hasty)
    [event] = [o for o in cluster.wait("mate", lambda o: len(o) > 0) if isinstance(o, TokenEvent)]
    check_greedy(event.token_ids, plain, prompt_of(4, 2), 1)


def needed(folder: Path, prompt: list[int]) -> set[tuple[int, int]]:
    cluster = LocalCluster(folder)
    cluster.generate(greedy_request("r", prompt, LENGTH))
    cluster.close()
    return {(f.layer_id, e) for f in cluster.transport.frames for e in f.expert_ids}


@pytest.mark.parametrize("failure", list(CallFailure))
def test_an_expert_that_is_away_holds_up_only_requests_that_need_it(
    folder: Path, plain: MixtralForCausalLM, failure: CallFailure
) -> None:
    cluster = LocalCluster(folder, NUM_EXPERTS)  # each actor holds one expert of a layer
    cluster.generate(greedy_request("first", prompt_of(4, 9), LENGTH))  # answers have their time
    needing, other = prompt_of(4, 2), prompt_of(4, 3)
    away = min(needed(folder, needing) - needed(folder, other))
    healed = threading.Event()
    missed: list[float] = []

    def hang(call: Call, number: int) -> CallFailure | None:
        frame = cluster.transport.frames[-1]
        if healed.is_set() or frame.layer_id != away[0] or away[1] not in frame.expert_ids:
            return None
        missed.append(call.timeout_s)
        threading.Event().wait(0.01 if failure is CallFailure.DIED else call.timeout_s)
        return failure

    cluster.transport.fail = hang
    hasty = greedy_request("hasty", needing, LENGTH, timeout_s=0.5)
    patient = greedy_request("patient", needing, LENGTH)
    unconcerned = greedy_request("unconcerned", other, LENGTH)
    for request in (hasty, patient, unconcerned):
        cluster.engine.submit(request)
    with pytest.raises(ExpertUnavailableError):
        cluster.result(hasty)
    assert time.monotonic() - hasty.deadline_s < 10.0
    assert missed  # the fault has hit
    assert cluster.wait("unconcerned", lambda outcomes: len(outcomes) > 0)
    healed.set()
    for request, prompt in ((unconcerned, other), (patient, needing)):
        [event] = cluster.result(request)
        check_greedy(event.token_ids, plain, prompt, LENGTH)
        assert event.exact
    cluster.close()


def test_a_slow_actor_answers_at_last_beside_requests_with_little_time(
    folder: Path, plain: MixtralForCausalLM
) -> None:
    """Each of them ends the wait for the actor, which takes longer than answers took before."""
    cluster = LocalCluster(folder, threaded=False)
    slow_s = 0.7
    cut: list[float] = []
    answered = threading.Event()

    def slow(call: Call, number: int) -> CallFailure | None:
        if call.timeout_s < slow_s and not answered.is_set():
            cut.append(call.timeout_s)
            threading.Event().wait(call.timeout_s)
            return CallFailure.TIMED_OUT
        if cut:
            answered.set()
        return None

    cluster.transport.fail = slow
    patient = greedy_request("patient", prompt_of(4, 2), 2)
    cluster.engine.submit(patient)
    cluster.engine.submit(greedy_request("hasty", prompt_of(4, 3), 2, timeout_s=0.3))
    cluster.engine.start()
    ended = threading.Event()

    def send() -> None:
        for number in itertools.count():
            if ended.wait(0.02):
                return
            request = greedy_request(f"{number}", prompt_of(4, number), 2, timeout_s=0.3)
            cluster.engine.submit(request)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        [event] = cluster.result(patient)
    finally:
        ended.set()
        sender.join(10)
        cluster.close()
    assert cut
    check_greedy(event.token_ids, plain, prompt_of(4, 2), 2)


@pytest.mark.parametrize("offset_s", [-DAY_S, -1.0, 1.0, 3600.0])
def test_a_wall_clock_that_jumps_expires_nothing(
    folder: Path, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, offset_s: float
) -> None:
    now_s, jumped = time.time, threading.Event()
    monkeypatch.setattr(time, "time", lambda: now_s() + offset_s * jumped.is_set())

    def jump(call: Call, number: int) -> None:
        if number > 10:
            jumped.set()

    cluster.transport.fail = jump
    [[event]] = cluster.generate(greedy_request("r", prompt_of(4, 2), LENGTH, timeout_s=20))
    assert jumped.is_set()
    assert len(event.token_ids) == LENGTH
    assert cluster.dispatcher.retries == {}


def test_a_request_without_any_placement_ends_at_its_deadline(folder: Path) -> None:
    cluster = LocalCluster(folder)
    cluster.view.placement, cluster.view.models = None, frozenset()
    try:
        with pytest.raises(ExpertUnavailableError, match="no placement"):
            cluster.generate(greedy_request("r", prompt_of(4, 2), LENGTH, timeout_s=0.2))
        cluster.view.publish(cluster.placement)
        [[event]] = cluster.generate(greedy_request("s", prompt_of(4, 2), LENGTH))
        assert len(event.token_ids) == LENGTH
    finally:
        cluster.close()
