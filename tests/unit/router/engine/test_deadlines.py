"""Deadlines: a request ends between steps, and only its own waits are bounded by its time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from transformers import MixtralForCausalLM

from cluster.errors import DeadlineExceededError, ExpertUnavailableError
from cluster.placement.placement import Placement, empty_placement
from cluster.spec import ModelExperts
from cluster.transport.base import Call, CallFailure
from router.messages.request import GenerationRequest, TokenEvent
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import OpenCluster, Saves
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

NUM_EXPERTS = 32
"""So many that no short request needs them all."""
LENGTH, NEIGHBOUR = 8, 12


@pytest.fixture(scope="module")
def folder(saved: Saves) -> Path:
    return saved("mixtral", num_local_experts=NUM_EXPERTS).folder


@pytest.fixture(scope="module")
def oracle(saved: Saves) -> MixtralForCausalLM:
    return saved("mixtral", num_local_experts=NUM_EXPERTS).model


def wait_out(request: GenerationRequest) -> None:
    """Return once a request's time is over."""
    threading.Event().wait(max(0.0, request.deadline_s - time.monotonic()))


def test_a_step_that_outlasts_a_request_still_gives_its_batch_mate_a_token(
    open_cluster: OpenCluster, oracle: MixtralForCausalLM
) -> None:
    cluster = open_cluster(threaded=False)
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
    check_greedy(event.token_ids, oracle, prompt_of(4, 2), 1)


def needed(cluster: LocalCluster, prompt: list[int]) -> set[tuple[int, int]]:
    first = len(cluster.transport.frames)
    cluster.generate(greedy_request(f"{prompt}", prompt, LENGTH))
    return {(f.layer_id, e) for f in cluster.transport.frames[first:] for e in f.expert_ids}


@pytest.mark.parametrize("failure", list(CallFailure))
def test_an_expert_that_is_away_holds_up_only_requests_that_need_it(
    open_cluster: OpenCluster, oracle: MixtralForCausalLM, failure: CallFailure
) -> None:
    cluster = open_cluster(num_actors=NUM_EXPERTS)  # each actor holds one expert of a layer
    needing, other = prompt_of(4, 2), prompt_of(4, 3)
    away = min(needed(cluster, needing) - needed(cluster, other))  # answers have their time now
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
        check_greedy(event.token_ids, oracle, prompt, LENGTH)
        assert event.exact


def test_a_slow_actor_answers_at_last_beside_requests_with_little_time(
    open_cluster: OpenCluster, oracle: MixtralForCausalLM
) -> None:
    """Each of them ends the wait for the actor, which takes longer than answers took before."""
    cluster = open_cluster(threaded=False)
    slow_s = 0.7
    cut: list[float] = []
    answered = threading.Event()

    def slow(call: Call, number: int) -> CallFailure | None:
        if answered.is_set():
            return None
        if len(cluster.scheduler.sequences()) < 3:
            cluster.engine.submit(greedy_request(f"{number}", prompt_of(4, number), 2, 0.3))
        if call.timeout_s < slow_s:
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
    [event] = cluster.result(patient)
    assert answered.is_set()
    check_greedy(event.token_ids, oracle, prompt_of(4, 2), 2)


@pytest.mark.parametrize("offset_s", [-86_400.0, 3600.0])
def test_a_wall_clock_that_jumps_expires_nothing(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, offset_s: float
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


@pytest.mark.parametrize("before", [None, empty_placement(0, [ModelExperts("other", (0,), 1, 1)])])
def test_a_model_that_no_placement_has_had_yet_is_waited_for_until_the_deadline(
    cluster: LocalCluster, before: Placement | None
) -> None:
    cluster.view.placement, cluster.view.models = before, frozenset()
    patient = greedy_request("patient", prompt_of(4, 2), LENGTH)
    cluster.engine.submit(patient)
    with pytest.raises(ExpertUnavailableError, match="no placement"):
        cluster.generate(greedy_request("hasty", prompt_of(4, 2), LENGTH, timeout_s=0.2))
    cluster.view.publish(cluster.placement)
    [event] = cluster.result(patient)
    assert len(event.token_ids) == LENGTH
