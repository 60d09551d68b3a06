"""A request that goes on after a failure: same tokens as without it, none emitted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.native import native
from router.engine.scheduling.scheduler import Limits
from router.messages.request import GenerationRequest, Received, TokenEvent
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import Saved
from tests.unit.router.engine.test_engine import prompt_of
from tests.unit.router.engine.test_independence import ALL

LENGTH = 12
PROMPT = prompt_of(20, 42)


pytestmark = pytest.mark.usefixtures("one_thread")
AT_ONCE, EACH = "at once", "one to a step"
LIMITS = Limits(32, 64, 256)


@pytest.fixture(
    scope="module",
    params=[
        (dtype, way)
        for dtype in ("float32", "bfloat16")
        for way in ([EACH] if native is None else [AT_ONCE, EACH])
    ],
    ids=str,
)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    """A cluster without a prefix cache, so that forced tokens are computed, not found."""
    dtype, way = request.param
    folder: Path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder, dtype=getattr(torch, dtype))
    cluster = LocalCluster(folder, limits=LIMITS, prefix_cache=False)
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
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rest_is_what_would_have_come(
    cluster: LocalCluster, count: int, temperature: float
) -> None:
    request = asked(f"r{count}{temperature}", temperature=temperature)
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


def test_forced_tokens_are_computed_like_a_prompt_or_one_to_a_step_as_the_first_time(
    cluster: LocalCluster,
) -> None:
    request = asked("shapes")
    first = len(cluster.transport.frames)
    [[whole]] = cluster.generate(request)
    again = len(cluster.transport.frames)
    cluster.generate(resumed(request, Received(whole.token_ids[: LENGTH - 1])))
    frames = cluster.transport.frames
    if is_at_once(cluster):
        # A step for the prompt and the forced tokens but the last, and one for that.
        num_layers = len(cluster.checkpoint.shape.layers)
        assert len(cluster.transport.frames) - again <= 2 * num_layers * 2
        return
    assert [(f.layer_id, f.num_tokens_per_expert, bytes(f.rows)) for f in frames[first:again]] == [
        (f.layer_id, f.num_tokens_per_expert, bytes(f.rows)) for f in frames[again:]
    ]


@pytest.mark.skipif(native is None, reason="bits are promised in native code alone")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL)
def test_a_long_answer_goes_on_bit_for_bit_in_a_crowd_in_every_family(
    saved: Callable[..., Saved], family: str, dtype: str
) -> None:
    folder, limits = saved(family).folder, Limits(32, 24, 256)
    cluster = LocalCluster(folder, limits=limits, dtype=dtype, prefix_cache=False)
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
    cluster.close()


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
    request = replace(
        request, request_id="eos2", sampling=replace(request.sampling, ignore_eos=False)
    )
    given = Received(whole.token_ids[: place + 1])
    [[end]] = cluster.generate(resumed(request, given))
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
    by_choice = {
        index: tuple(t for e in last if isinstance(e, TokenEvent) and e.index == index
                     for t in e.token_ids)
        for index in range(3)
    }  # fmt: skip
    assert by_choice == {0: first.token_ids[2:], 1: (), 2: third.token_ids[7:]}


def test_a_request_travels_with_what_has_been_received() -> None:
    request = resumed(asked("wire", n=2), Received((1, 2)), Received((), True))
    got = GenerationRequest.from_wire(request.to_wire())
    assert got.remaining_s() == pytest.approx(request.remaining_s(), abs=1.0)
    assert replace(got, deadline_s=request.deadline_s) == request
    assert GenerationRequest.from_wire(asked("new").to_wire()).received == ()
