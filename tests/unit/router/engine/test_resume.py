"""A request that goes on after a failure: same tokens as without it, none emitted twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from cluster.native import native
from router.engine.scheduling.scheduler import Limits
from router.messages.receipts import merge_events
from router.messages.request import GenerationRequest, Received, TokenEvent
from router.messages.rules import TokenRules
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import ALL, OpenCluster, Saves
from tests.unit.router.engine.test_engine import prompt_of

LENGTH = 12
PROMPT = prompt_of(20, 42)
pytestmark = pytest.mark.usefixtures("one_thread")
KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "warm": {},
    "with rules": {"rules": TokenRules(0.9, 0.4, 1.4, ((5, 2.0),), 6, (9,), ((4,), (7, 8)))},
}
AT_ONCE, EACH = "at once", "one to a step"


WAYS = [EACH] if native is None else [AT_ONCE, EACH]


@pytest.fixture(scope="module", params=itertools.product(("float32", "bfloat16"), WAYS), ids=str)
def cluster(request: pytest.FixtureRequest, saved: Saves) -> Iterator[LocalCluster]:
    """A cluster without a prefix cache, so that forced tokens are computed, not found."""
    dtype, way = request.param
    cluster = LocalCluster(saved("mixtral", dtype=getattr(torch, dtype)).folder, prefix_cache=False)
    if way == EACH:
        cluster.view.expert_classes = frozenset({"torch-avx2"})
    yield cluster
    cluster.close()


def is_at_once(cluster: LocalCluster) -> bool:
    return native is not None and not cluster.view.expert_classes


def asked(name: str, **sampling: object) -> GenerationRequest:
    return greedy_request(
        name, PROMPT, LENGTH, **{"temperature": 1.0, "seed": 5, "logprobs": 2, **sampling}
    )


def resumed(request: GenerationRequest, *received: Received) -> GenerationRequest:
    return replace(request, request_id=f"{request.request_id}-again", received=received)


@pytest.mark.parametrize("count", [0, 1, 2, LENGTH - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_what_would_have_come(cluster: LocalCluster, count: int, kind: str) -> None:
    request = asked(f"r{count}{kind}", **KINDS[kind])
    [[whole]] = cluster.generate(request)
    given = Received(whole.token_ids[:count])
    before = cluster.engine.replayed.copy()
    [[rest]] = cluster.generate(resumed(request, given))
    assert rest == replace(
        whole, token_ids=whole.token_ids[count:], logprobs=whole.logprobs[count:], start=count
    )
    num_drawn = min(count, 1) if is_at_once(cluster) else count
    assert cluster.engine.replayed - before == ({"equal": num_drawn} if count else {})
    assert cluster.scheduler.num_free_pages == 512


@pytest.mark.parametrize("was_exact", [True, False])
@pytest.mark.parametrize("count", [1, LENGTH - 1])
def test_what_was_not_exact_stays_so(cluster: LocalCluster, count: int, was_exact: bool) -> None:
    request = asked(f"e{count}{was_exact}", n=2)
    wholes = cluster.generate(request)[0]
    given = [Received(whole.token_ids[:count], exact=was_exact) for whole in wholes]
    rests = cluster.generate(resumed(request, given[0], replace(given[1], exact=True)))[0]
    assert [rest.exact for rest in rests] == [was_exact, True]


@pytest.mark.skipif(native is None, reason="bits are promised in native code alone")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL)
def test_a_long_answer_goes_on_bit_for_bit_in_a_crowd_in_every_family(
    saved: Saves, open_cluster: OpenCluster, family: str, dtype: str
) -> None:
    folder, limits = saved(family).folder, Limits(32, 24, 256)
    cluster = open_cluster(folder, limits=limits, dtype=dtype, prefix_cache=False)
    requests = [
        greedy_request(f"r{i}", prompt_of(9 + 7 * i, i), 40, temperature=1.0, seed=i, logprobs=1)
        for i in range(3)
    ]
    expected = cluster.generate(*requests)
    counts = (38, 20, 1)  # more than a step takes, and together with another request's
    again = [
        resumed(request, Received(whole.token_ids[:count]))
        for request, [whole], count in zip(requests, expected, counts, strict=True)
    ]
    for [rest], [whole], count in zip(cluster.generate(*again), expected, counts, strict=True):
        assert rest.token_ids == whole.token_ids[count:]
        assert rest.logprobs == whole.logprobs[count:]
    if cluster.model.is_independent:
        assert cluster.engine.replayed == {"equal": len(counts)}


def test_tokens_that_the_replica_would_not_have_drawn_are_forced_all_the_same(
    cluster: LocalCluster,
) -> None:
    request = asked("other", temperature=0.0)
    [[whole]] = cluster.generate(request)
    forced = (whole.token_ids[0], (whole.token_ids[1] + 1) % 100 + 1, whole.token_ids[2])
    [[rest]] = cluster.generate(resumed(request, Received(forced)))
    longer = greedy_request("longer", [*PROMPT, *forced], LENGTH - 3)
    [[expected]] = cluster.generate(longer)
    if cluster.checkpoint.dtype == "float32" or native is not None:  # torch rounds by shape
        assert rest.token_ids == expected.token_ids
    assert (rest.start, len(rest.token_ids)) == (3, LENGTH - 3)
    assert cluster.engine.replayed["different"] >= 1


def test_all_forced_ends_without_a_token(cluster: LocalCluster) -> None:
    request = asked("all")
    [[whole]] = cluster.generate(request)
    [[end]] = cluster.generate(resumed(request, Received(whole.token_ids)))
    assert end == TokenEvent(0, (), (), "length", start=LENGTH)


def test_forced_tokens_that_end_with_the_end_of_sequence_end_the_choice(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked("eos")
    [[whole]] = cluster.generate(request)
    monkeypatch.setattr(cluster.engine, "_eos_token_ids", frozenset([whole.token_ids[3]]))
    place = whole.token_ids.index(whole.token_ids[3])
    given = Received(whole.token_ids[: place + 1])
    [[end]] = cluster.generate(resumed(asked("eos2", ignore_eos=False), given))
    assert end == TokenEvent(0, (), (), "stop", start=place + 1)


def test_each_choice_goes_on_from_its_own_tokens_and_a_finished_one_is_not_computed(
    cluster: LocalCluster,
) -> None:
    request = asked("n", n=3)
    [[first, second, third]] = cluster.generate(request)
    again = resumed(
        request,
        Received(first.token_ids[:2]),
        Received(second.token_ids, finished=True),
        Received(third.token_ids[:7]),
    )
    cluster.engine.submit(again)
    last = cluster.wait(
        again.request_id,
        lambda outcomes: sum(bool(getattr(o, "finish_reason", None)) for o in outcomes) == 2,
    )
    events = merge_events([event for event in last if isinstance(event, TokenEvent)])
    by_choice = {event.index: event.token_ids for event in events}
    assert by_choice == {0: first.token_ids[2:], 2: third.token_ids[7:]}


def test_a_request_travels_with_its_rules_and_what_has_been_received() -> None:
    rules = TokenRules(0.5, 0.25, 1.2, ((5, 3.0), (7, -2.0)), 3, (1, 2), ((4, 5), (8,)))
    request = resumed(asked("wire", n=2, rules=rules), Received((1, 2)), Received((), True))
    got = GenerationRequest.from_wire(request.to_wire())
    assert got.remaining_s() == pytest.approx(request.remaining_s(), abs=1.0)
    assert replace(got, deadline_s=request.deadline_s) == request
    assert GenerationRequest.from_wire(asked("new").to_wire()).received == ()
