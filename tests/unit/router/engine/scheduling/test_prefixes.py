"""Requests that share a prefix get the tokens that each gets alone, bit for bit, and compute less.

Every comparison is with a router that shares nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from cluster.errors import (
    CancelledRequestError,
    ExpertMeshError,
    NotFiniteError,
    PoisonedRequestError,
)
from cluster.native import native
from router.engine.isolation import Isolation
from router.engine.scheduling.prefixes import why_dependent
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.messages.request import GenerationRequest, Received, TokenEvent
from router.messages.rules import TokenRules
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import ALL, OpenCluster, Saves
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = [
    pytest.mark.skipif(native is None, reason="bits are promised in native code alone"),
    pytest.mark.usefixtures("one_thread"),
]
PAGE = 16
LIMITS = Limits(32, 64, 256)
COMMON = prompt_of(3 * PAGE, 1)
RULES = TokenRules(0.9, 0.4, 1.4, ((5, 2.0),), 6, (9,), ((4,), (7, 8)))


@pytest.fixture
def open_cluster(open_cluster: OpenCluster) -> OpenCluster:
    return partial(open_cluster, dtype="bfloat16")


def without_cached(events: list[TokenEvent]) -> list[TokenEvent]:
    return [replace(event, cached_tokens=0) for event in events]


def hits(cluster: LocalCluster) -> int:
    assert cluster.scheduler.prefixes is not None
    return cluster.scheduler.prefixes.hit_tokens


def num_idle(cluster: LocalCluster) -> int:
    return cluster.scheduler._pool.num_idle


def crowd() -> list[GenerationRequest]:
    """Requests of every kind, whose prompts share no, some or all pages with others'."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3, "logprobs": 2},
        {"temperature": 0.8, "seed": 4, "rules": RULES},
        {"n": 3, "temperature": 1.0, "seed": 5},
        {"prompt_logprobs": 1},
    ]
    prompts = [
        [*COMMON[:length], *prompt_of(own, 10 + own)]
        for length, own in ((0, 5), (15, 9), (16, 1), (24, 20), (32, 0), (48, 0), (48, 30))
    ]
    return [
        greedy_request(f"r{i}.{j}", prompt, 6 + 5 * j, **kind)
        for i, prompt in enumerate(prompts)
        for j, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(("dtype", "cache_tokens"), [("bfloat16", 8192), ("float32", 640)])
def test_hits_change_no_token_in_a_crowd_nor_under_eviction(
    open_cluster: OpenCluster, dtype: str, cache_tokens: int
) -> None:
    requests = crowd()
    expected = open_cluster(dtype=dtype, prefix_cache=False).generate(*requests)
    cluster = open_cluster(dtype=dtype, cache_tokens=cache_tokens)
    for turn in range(2):
        again = [replace(r, request_id=f"{r.request_id}/{turn}") for r in requests]
        assert list(map(without_cached, cluster.generate(*again))) == expected
        assert cluster.scheduler.num_free_pages == cluster.scheduler.num_pages
    assert hits(cluster) > 20 * PAGE


@pytest.mark.parametrize("family", ALL)
def test_hits_change_no_token_of_any_family(
    saved: Saves, open_cluster: OpenCluster, family: str
) -> None:
    folder = saved(family).folder
    request = greedy_request("r", [*COMMON, 5, 6], 6, temperature=1.0, seed=2, logprobs=1)
    results = []
    for is_on in (False, True):
        cluster = open_cluster(folder, prefix_cache=is_on)
        cluster.generate(greedy_request("other", [*COMMON, 9], 3))
        results.append(cluster.generate(request)[0])
    assert [event.cached_tokens for [event] in results] == [0, len(COMMON)]
    assert without_cached(results[1]) == results[0]


def test_whole_pages_before_the_last_token_are_found(open_cluster: OpenCluster) -> None:
    cluster = open_cluster()
    for length, cached in ((1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (48, 32), (49, 48)):
        prompt = prompt_of(length, length)
        for name, expected in (("first", 0), ("second", cached)):
            [[event]] = cluster.generate(greedy_request(f"{name} of {length}", prompt, 2))
            assert event.cached_tokens == expected


def test_two_prompts_that_share_one_and_a_half_pages_share_one(open_cluster: OpenCluster) -> None:
    cluster = open_cluster()
    for name, own, cached in (("a", 2, 0), ("b", 3, PAGE), ("c", 2, 2 * PAGE)):
        prompt = [*COMMON[:24], *prompt_of(12, own)]
        [[event]] = cluster.generate(greedy_request(name, prompt, 4))
        assert event.cached_tokens == cached


def test_of_requests_that_come_together_one_computes_what_all_begin_with(
    open_cluster: OpenCluster,
) -> None:
    cluster = open_cluster(threaded=False)
    prompt = prompt_of(20 * PAGE, 4)
    for name in "abcd":
        cluster.scheduler.add(greedy_request(name, [*prompt, ord(name) % 7], 2))
    computed = 0
    while works := cluster.scheduler.schedule():
        computed += sum(work.end - work.start for work in works)
        cluster.engine.step(works)
    assert computed < 2 * len(prompt)


def test_a_second_turn_finds_the_generated_tokens_of_the_first(open_cluster: OpenCluster) -> None:
    cluster, alone = open_cluster(), open_cluster(prefix_cache=False)
    [[first]] = cluster.generate(greedy_request("a", COMMON[:20], 30))
    follow_up = greedy_request("b", [*COMMON[:20], *first.token_ids, 5, 6], 6)
    [[second]] = cluster.generate(follow_up)
    assert second.cached_tokens == 3 * PAGE  # of 49 that are computed
    assert without_cached([second]) == alone.generate(follow_up)[0]


@pytest.mark.parametrize("count", [1, 14, 15, 29, 30])
def test_a_resumed_request_finds_its_prompt_and_forced_tokens(
    open_cluster: OpenCluster, count: int
) -> None:
    cluster = open_cluster()
    request = greedy_request("a", COMMON[:20], 31, temperature=1.0, seed=4, logprobs=1, rules=RULES)
    [[whole]] = cluster.generate(request)
    received = (Received(whole.token_ids[:count]),)
    [[rest]] = cluster.generate(replace(request, request_id="b", received=received))
    assert rest.token_ids == whole.token_ids[count:]
    assert rest.logprobs == whole.logprobs[count:]
    found = (20 + count - 2) // PAGE * PAGE  # all pages before the last two tokens
    assert (rest.start, rest.cached_tokens, rest.finish_reason) == (count, min(found, 20), "length")
    assert cluster.engine.replayed == {"equal": 1}


def test_prompt_log_probabilities_are_computed_and_not_found(open_cluster: OpenCluster) -> None:
    cluster = open_cluster()
    request = greedy_request("a", [*COMMON, 5], 3, prompt_logprobs=2)
    [[first]] = cluster.generate(request)
    [[second]] = cluster.generate(replace(request, request_id="b"))
    assert second == first
    assert len(second.prompt_logprobs) == len(COMMON)
    # One that goes on has some of them, and finds the pages before the others.
    received = (Received(num_prompt_logprobs=2 * PAGE + 3, identity="m"),)
    [[rest]] = cluster.generate(replace(request, request_id="c", received=received))
    assert rest.cached_tokens == 2 * PAGE
    assert rest.prompt_logprobs == first.prompt_logprobs[2 * PAGE + 3 :]
    assert rest.token_ids == first.token_ids


@pytest.mark.parametrize("change", [{"tenant": "other"}, {"cache_salt": "salt"}])
def test_tenants_and_salts_are_apart(open_cluster: OpenCluster, change: dict[str, str]) -> None:
    cluster = open_cluster()
    request = greedy_request("a", [*COMMON, 5], 3)
    cluster.generate(request)
    for name, cached in (("b", 0), ("c", len(COMMON))):
        [[event]] = cluster.generate(replace(request, request_id=name, **change))
        assert event.cached_tokens == cached


def test_another_model_finds_nothing_even_in_the_same_cache() -> None:
    scheduler = Scheduler(LIMITS, 32, PAGE, shared_by="first")
    assert (served(scheduler, "a"), served(scheduler, "b")) == (0, len(COMMON))
    assert scheduler.prefixes is not None
    scheduler.prefixes._identity = "second"
    assert served(scheduler, "c") == 0


def served(
    scheduler: Scheduler, name: str, exact: bool = True, error: ExpertMeshError | None = None
) -> int:
    """Compute a request's prompt without a model; returns what was found of it."""
    [sequence] = scheduler.add(greedy_request(name, [*COMMON, 5], 3))
    for _ in range(2):
        [work] = scheduler.schedule()
        sequence.num_computed, sequence.exact = work.end, exact
        sequence.token_ids.append(7)
    scheduler.finish(sequence, error)
    return sequence.num_cached


@pytest.mark.parametrize(
    "state", [{"exact": False}, {"error": NotFiniteError("")}, {"error": PoisonedRequestError("")}]
)
def test_pages_of_inexact_and_unsound_sequences_are_not_shared(state: dict[str, Any]) -> None:
    scheduler = Scheduler(LIMITS, 32, PAGE, shared_by="m")
    assert served(scheduler, "a", **state) == 0
    assert served(scheduler, "b", error=CancelledRequestError("")) == 0
    assert served(scheduler, "c", **state) == len(COMMON)
    # An unsound sequence takes the pages along that it found.
    assert served(scheduler, "d") == (0 if "error" in state else len(COMMON))
    assert scheduler.num_free_pages == scheduler.num_pages


def test_tokens_computed_without_an_expert_are_not_found(open_cluster: OpenCluster) -> None:
    cluster = open_cluster()
    cluster.lose([(0, expert) for expert in range(3)])
    prompt = [*COMMON, 5]
    [[event]] = cluster.generate(greedy_request("a", prompt, 3, on_expert_loss="drop"))
    assert not event.exact
    assert num_idle(cluster) == 0
    cluster.lose([])
    [[exact]] = cluster.generate(greedy_request("b", prompt, 3))
    assert exact.exact
    assert exact.cached_tokens == 0


def test_a_full_cache_serves_every_request_and_keeps_what_was_used_last(
    open_cluster: OpenCluster,
) -> None:
    cluster = open_cluster(cache_tokens=8 * PAGE)
    old, new = prompt_of(3 * PAGE + 1, 21), prompt_of(3 * PAGE + 1, 22)
    for name, prompt in (("old", old), ("new", new), ("old again", old)):
        cluster.generate(greedy_request(name, prompt, 2))
    # Two idle rows of 3 pages each; 5 more pages leave the first of "new" none.
    cluster.generate(greedy_request("large", prompt_of(4 * PAGE + 1, 23), 2))
    [[event]] = cluster.generate(greedy_request("old still", old, 2))
    assert event.cached_tokens == 3 * PAGE
    [[event]] = cluster.generate(greedy_request("new", new, 2))
    assert event.cached_tokens == 0


def test_the_test_of_the_router_writes_no_shared_page(open_cluster: OpenCluster) -> None:
    cluster, alone = open_cluster(threaded=False), open_cluster(prefix_cache=False)
    request = greedy_request("a", [*COMMON, 5], 4)
    expected = alone.generate(request)[0]
    [sequence] = cluster.scheduler.add(request)
    cluster.engine.step(cluster.scheduler.schedule())
    [other] = cluster.scheduler.add(greedy_request("b", [*COMMON, 9], 4))
    cluster.scheduler.schedule()
    assert other.num_cached == len(COMMON)
    isolation: Isolation = cluster.engine._isolation
    with torch.inference_mode():
        isolation._judge(other, RuntimeError("the step failed"))
    assert isinstance(cluster.engine._outbox.pop().outcome, PoisonedRequestError)
    while sequence.pages:
        cluster.engine.step(cluster.scheduler.schedule())
    assert sequence.generated == list(expected[0].token_ids)


def test_parked_sequences_neither_skip_nor_lose_pages() -> None:
    scheduler = Scheduler(LIMITS, 16, PAGE, shared_by="m")
    [parked] = scheduler.add(greedy_request("a", [*COMMON, 5], 3))
    scheduler.schedule()
    parked.awaited = frozenset({(0, 0)})
    assert served(scheduler, "b") == 0
    before = list(parked.pages)
    assert scheduler.schedule() == []
    assert (parked.num_computed, parked.pages) == (0, before)
    parked.awaited = frozenset()
    [work] = scheduler.schedule()
    assert (work.start, work.end) == (len(COMMON), len(COMMON) + 1)
    scheduler.finish(parked)
    assert scheduler.num_free_pages == scheduler.num_pages


def test_nothing_is_shared_where_bits_are_not_promised() -> None:
    assert why_dependent(True, False) == ""
    assert "on the batch" in why_dependent(False, False)
    assert "expert_capacity" in why_dependent(True, True)


def test_nothing_is_shared_while_torch_computes_experts(
    open_cluster: OpenCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = open_cluster()

    def found(name: str, classes: set[str]) -> int:
        cluster.view.expert_classes = frozenset(classes)
        [[event]] = cluster.generate(greedy_request(name, [*COMMON, 5], 4))
        return event.cached_tokens

    assert (found("cold", {"fused"}), found("hot", {"fused", "paired"})) == (0, len(COMMON))
    with caplog.at_level("INFO", "expertmesh.engine"):
        for name in ("on torch", "again on torch"):
            assert found(name, {"fused", "torch-avx2", "cuda grouped"}) == 0
    [line] = caplog.messages
    assert "without native code (cuda grouped, torch-avx2)" in line
    assert num_idle(cluster) == 0
    # Neither what was shared before nor what torch computed is found afterwards.
    assert (found("cold again", {"fused"}), found("hot again", {"fused"})) == (0, len(COMMON))


def test_after_an_actor_is_replaced_nothing_before_it_is_found(open_cluster: OpenCluster) -> None:
    """Its device may have given wrong numbers, and all that follows from them is wrong."""
    cluster = open_cluster()

    def ask(name: str) -> int:
        before = hits(cluster)
        cluster.generate(greedy_request(name, [*COMMON, 5], 4))
        return hits(cluster) - before

    assert (ask("cold"), ask("hot")) == (0, len(COMMON))
    placement = cluster.placement
    cluster.view.publish(replace(placement, version=placement.version + 1))
    assert ask("as hot") == len(COMMON)
    replaced = {**placement.generations, "a0": 2}
    newer = replace(placement, version=placement.version + 2, generations=replaced)
    cluster.view.publish(newer)
    assert (ask("cold again"), ask("hot again")) == (0, len(COMMON))


@pytest.mark.parametrize(
    ("generations", "classes"),
    [({"a0": 2}, set()), ({}, set()), ({"a1": 1}, set()), ({"a0": 1}, {"torch-avx2"})],
    ids=["replaced", "gone", "another", "on torch"],
)
def test_a_sequence_that_runs_while_an_actor_goes_or_torch_begins_shares_nothing(
    open_cluster: OpenCluster, generations: dict[str, int], classes: set[str]
) -> None:
    cluster = open_cluster(threaded=False)
    scheduler = cluster.scheduler
    scheduler.look({"a0": 1}, frozenset())
    [first, second] = [
        scheduler.add(greedy_request(name, [*COMMON, 5], 4))[0] for name in ("a", "b")
    ]
    cluster.engine.step(scheduler.schedule())
    scheduler.look(generations, frozenset(classes))
    while scheduler.sequences():
        cluster.engine.step(scheduler.schedule())
    assert (first.num_cached, second.num_cached, num_idle(cluster)) == (0, 0, 0)
    assert first.generated == second.generated
    assert scheduler.num_free_pages == scheduler.num_pages
