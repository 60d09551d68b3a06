"""One request's fault ends that request alone: it is found by halves, or computed alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from cluster.errors import ExpertMeshError, InternalError, PoisonedRequestError
from cluster.transport.base import Call, CallFailure
from cluster.wire.frames import DispatchFrame, ErrorFrame, decode, encode
from router.engine import isolation
from router.engine.sequence import ALONE_TOKENS
from router.messages.request import GenerationRequest, Received, TokenEvent
from tests.checkpoints import VOCAB_SIZE, transformers_tokens
from tests.local_cluster import LocalCluster, greedy_request
from tests.poison import LAYER, last_rows, rows_of
from tests.unit.router.engine.conftest import OpenCluster
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

POISON = [VOCAB_SIZE - 1, 7, VOCAB_SIZE - 1]
"""Tokens of a prompt; no other prompt or answer has them."""
COUNT = 6
TOP_K = 2
CROWD = 8
BACK_S = 1.0


@pytest.fixture
def cluster(open_cluster: OpenCluster) -> LocalCluster:
    return open_cluster(threaded=False)


_tokens: dict[tuple[int, ...], tuple[int, ...]] = {}


def has_poison(token_ids: torch.Tensor) -> bool:
    return any(token_ids[at : at + 3].tolist() == POISON for at in range(len(token_ids) - 2))


def crowd() -> tuple[list[GenerationRequest], GenerationRequest]:
    """Return innocent requests, and one whose prompt has the poison."""
    innocent = [greedy_request(f"r{i}", prompt_of(5, i), COUNT) for i in range(CROWD - 1)]
    return innocent, greedy_request("poison", POISON, COUNT)


def check_innocent(
    cluster: LocalCluster, oracle: MixtralForCausalLM, requests: list[GenerationRequest]
) -> None:
    """Check that every request has the tokens that it has without the others."""
    for request in requests:
        [event] = cluster.result(request)
        prompt = request.prompt_token_ids
        if _tokens.get(prompt) != event.token_ids:
            check_greedy(event.token_ids, oracle, prompt, COUNT)
            _tokens[prompt] = event.token_ids


@dataclass
class Steps:
    """The steps of an engine, by the numbers of tokens; ``fails`` says which raise."""

    cluster: LocalCluster
    monkeypatch: pytest.MonkeyPatch
    fails: Callable[[torch.Tensor], bool]
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        decoder = self.cluster.model.decoder
        forward = decoder.forward

        def checked(token_ids: torch.Tensor, *others: Any) -> Any:
            self.sizes.append(len(token_ids))
            if self.fails(token_ids):
                raise RuntimeError("a fault of the test's")
            return forward(token_ids, *others)

        self.monkeypatch.setattr(decoder, "forward", checked)


def start(cluster: LocalCluster, *requests: GenerationRequest) -> None:
    """Start the engine with all requests in its first step."""
    for request in requests:
        cluster.engine.submit(request)
    cluster.engine.start()


@pytest.mark.parametrize("num_bad", [1, 2])
def test_a_step_that_raises_fails_the_requests_at_fault_alone(
    cluster: LocalCluster, oracle: MixtralForCausalLM, monkeypatch: pytest.MonkeyPatch, num_bad: int
) -> None:
    steps = Steps(cluster, monkeypatch, has_poison)
    innocent, poison = crowd()
    others = [greedy_request("other", [5, *POISON], COUNT)][: num_bad - 1]
    start(cluster, *others, *innocent[:4], poison, *innocent[4:])
    for request in (poison, *others):
        with pytest.raises(PoisonedRequestError, match=r"compute this request \(RuntimeError\)"):
            cluster.result(request)
    check_innocent(cluster, oracle, innocent)
    # The first step, two of each halving, one probe; then a decode for each later token.
    assert len(steps.sizes) <= 1 + num_bad * (2 * 3 + 1) + COUNT
    assert cluster.scheduler.num_free_pages == cluster.scheduler.num_pages


def test_a_step_that_raises_once_fails_nobody(
    cluster: LocalCluster, oracle: MixtralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(cluster, monkeypatch, lambda token_ids: len(steps.sizes) == 1)
    lone = greedy_request("r", prompt_of(5, 1), COUNT)
    start(cluster, lone)
    check_innocent(cluster, oracle, [lone])
    assert len(steps.sizes) == COUNT + 1


def test_a_router_that_cannot_compute_any_step_ends_and_its_log_says_why(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(isolation, "end_process", ended.set)
    Steps(cluster, monkeypatch, lambda token_ids: True)
    start(cluster, greedy_request("r", prompt_of(5, 1), COUNT))
    assert ended.wait(30)
    assert "the router exits: it cannot compute any step" in caplog.text


def test_experts_without_an_answer_are_no_fault_of_a_request_or_router(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors that refuse all frames as malformed fail the requests, and end no router."""
    ended = threading.Event()
    monkeypatch.setattr(isolation, "end_process", ended.set)
    cluster.transport.fail = lambda call, number: b"no frame at all"
    request = greedy_request("r", prompt_of(5, 1), COUNT, timeout_s=0.5)
    start(cluster, request)
    with pytest.raises(ExpertMeshError):
        cluster.result(request)
    assert not ended.is_set()


# Expert actors that die.


def frame_of(call: Call) -> DispatchFrame:
    frame = decode(b"".join(call.frame))
    assert isinstance(frame, DispatchFrame)
    return frame


@dataclass
class Deaths:
    """Actors that die, and come back as their next generation, at some frames."""

    cluster: LocalCluster
    kills: Callable[[DispatchFrame], bool]
    died: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, call: Call, number: int) -> CallFailure | None:
        generation = self.cluster.view.placement.generations[call.actor_id]
        if call.generation != generation:
            return CallFailure.DIED
        if not self.kills(frame_of(call)):
            return None
        self.died.append((call.actor_id, call.generation))
        placement = self.cluster.view.placement
        keys = [k for k, actors in placement.holders.items() if call.actor_id in actors]
        self.cluster.view.publish(placement.with_actor(call.actor_id, generation + 1, keys))
        return CallFailure.DIED


@pytest.mark.parametrize("min_copies", [1, 2])
def test_a_frame_that_kills_its_actors_ends_its_request_after_four_rounds(
    folder: Path, open_cluster: OpenCluster, oracle: MixtralForCausalLM, min_copies: int
) -> None:
    rows = last_rows(folder, POISON)
    cluster = open_cluster(num_actors=3, min_copies=min_copies, threaded=False)
    cluster.transport.fail = deaths = Deaths(cluster, lambda frame: bool(rows & rows_of(frame)))
    innocent, poison = crowd()
    start(cluster, *innocent[:4], poison, *innocent[4:])
    with pytest.raises(PoisonedRequestError, match="died 4 times at this request"):
        cluster.result(poison)
    check_innocent(cluster, oracle, innocent)
    assert len(deaths.died) <= 4 * TOP_K  # a token has its experts on two actors


def test_actors_that_die_of_something_else_fail_no_request(
    open_cluster: OpenCluster, oracle: MixtralForCausalLM
) -> None:
    """Twice in one layer, an actor dies with rows of all requests; no third one does."""
    cluster = open_cluster(num_actors=3, min_copies=2, threaded=False)

    def kills(frame: DispatchFrame) -> bool:
        return frame.layer_id == LAYER and len({actor for actor, _ in deaths.died}) < 2

    cluster.transport.fail = deaths = Deaths(cluster, kills)
    innocent, _ = crowd()
    start(cluster, *innocent)
    check_innocent(cluster, oracle, innocent)
    assert len(deaths.died) >= 2


@pytest.mark.parametrize("is_broken", [False, True])
def test_actors_that_died_before_a_request_is_computed_alone_do_not_count(
    open_cluster: OpenCluster, oracle: MixtralForCausalLM, is_broken: bool
) -> None:
    """Two actors die, then all, at another router's request; the placement has them still.

    Or the devices of all fail, and the controller ends each that has rows.
    """
    cluster = open_cluster(num_actors=4, min_copies=2, threaded=False)
    alive, died = dict(cluster.view.placement.generations), list[DispatchFrame]()

    def come_back() -> None:
        placement = cluster.view.placement
        for actor_id in list(placement.generations):
            keys = [k for k, actors in placement.holders.items() if actor_id in actors]
            placement = placement.with_actor(actor_id, 2, keys)
            alive[actor_id] = 2
        cluster.view.publish(placement)

    def fail(call: Call, number: int) -> CallFailure | None:
        frame = frame_of(call)
        is_copy = bool(died) and set(frame.expert_ids) <= set(died[0].expert_ids)
        if not died or (len(died) < 2 and is_copy):
            died.append(frame)
            alive.pop(call.actor_id)
            if len(died) == 2:
                alive.clear()
                threading.Timer(BACK_S, come_back).start()
            return CallFailure.DIED
        if alive.get(call.actor_id) == call.generation:
            return None
        is_test = not any(bytes(frame.rows))
        return internal_error(call) if is_broken and is_test else CallFailure.DIED

    cluster.transport.fail = fail
    innocent, _ = crowd()
    start(cluster, *innocent)
    check_innocent(cluster, oracle, innocent)


# Expert actors that answer errors.


def internal_error(call: Call) -> bytes:
    error = InternalError("the expert actor failed to compute the batch")
    return b"".join(encode(ErrorFrame(frame_of(call).request_id, "InternalError", error)))


@pytest.mark.parametrize("min_copies", [1, 2])
def test_rows_at_which_every_copy_fails_end_their_request_alone(
    folder: Path, open_cluster: OpenCluster, oracle: MixtralForCausalLM, min_copies: int
) -> None:
    rows = last_rows(folder, POISON)
    cluster = open_cluster(num_actors=3, min_copies=min_copies, threaded=False)

    def fail(call: Call, number: int) -> bytes | None:
        return internal_error(call) if rows & rows_of(frame_of(call)) else None

    cluster.transport.fail = fail
    innocent, poison = crowd()
    start(cluster, *innocent[:4], poison, *innocent[4:])
    with pytest.raises(PoisonedRequestError, match="cannot compute this request in layer 1"):
        cluster.result(poison)
    check_innocent(cluster, oracle, innocent)


def test_an_actor_that_fails_at_all_rows_is_waited_for_and_no_request_is_to_blame(
    open_cluster: OpenCluster, oracle: MixtralForCausalLM
) -> None:
    cluster = open_cluster(num_actors=3, threaded=False)
    num_errors = 0

    def fail(call: Call, number: int) -> bytes | None:
        nonlocal num_errors
        if call.actor_id != "a2" or num_errors >= 12:  # then its successor is there
            return None
        num_errors += 1
        return internal_error(call)

    cluster.transport.fail = fail
    innocent, _ = crowd()
    start(cluster, *innocent)
    check_innocent(cluster, oracle, innocent)
    assert num_errors == 12


# Requests that come alone.


def of_request(cluster: LocalCluster) -> list[set[str]]:
    """Return a list of each step's requests, which grows."""
    steps: list[set[str]] = []
    step = cluster.engine.step

    def counted(works: list[Any], *others: Any) -> None:
        steps.append({work.sequence.request.request_id for work in works})
        step(works, *others)

    cluster.engine.step = counted  # type: ignore[method-assign]
    return steps


def alone_request(tokens: tuple[int, ...], prompt: list[int], count: int) -> GenerationRequest:
    request = greedy_request("suspect", prompt, count)
    return replace(request, alone=True, received=(Received(tokens),))


def test_a_request_that_comes_alone_has_steps_of_its_own_until_it_has_new_tokens(
    cluster: LocalCluster, oracle: MixtralForCausalLM
) -> None:
    steps = of_request(cluster)
    told: list[tuple[str, bool, int]] = []

    def announce(request_id: str, is_alone: bool) -> bool:
        told.append((request_id, is_alone, len(steps)))
        return True

    cluster.engine._isolation._announce = announce
    prompt, count = prompt_of(5, 50), 20
    expected = transformers_tokens(oracle, prompt, count)
    others = [greedy_request(f"r{i}", prompt_of(5, i), 30) for i in range(3)]
    suspect = alone_request(expected[:3], prompt, count)
    start(cluster, *others, suspect)
    [event] = cluster.result(suspect)
    assert event.token_ids == expected[3:]
    for request in others:
        cluster.result(request)
    # Native code computes the three tokens that have come with the prompt, torch one to a step.
    num_alone = ALONE_TOKENS + (1 if cluster.model.is_independent else 3)
    own = [step for step in steps if "suspect" in step][: num_alone + 1]
    assert own == [*[{"suspect"}] * num_alone, {"suspect", "r0", "r1", "r2"}]
    # Each such step is told before it begins and after it has ended, and the others take turns.
    begun = [at for _, is_alone, at in told if is_alone]
    assert [steps[at] for at in begun] == [{"suspect"}] * len(begun)
    assert [at for _, is_alone, at in told if not is_alone] == [at + 1 for at in begun]
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(begun))


def test_a_request_is_not_computed_alone_unless_its_gateway_knows(cluster: LocalCluster) -> None:
    cluster.engine._isolation._announce = lambda request_id, is_alone: False
    suspect = alone_request((), prompt_of(5, 1), 3)
    start(cluster, suspect)
    with pytest.raises(ExpertMeshError, match="could not tell the gateway") as caught:
        cluster.result(suspect)
    assert caught.value.retry_after_s
    assert not [o for o in cluster.wait("suspect", bool) if isinstance(o, TokenEvent)]
