"""A request that goes on after a failure: same tokens as without it, none emitted twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.native.built import native
from router.engine.scheduler import Limits
from router.messages.request import GenerationRequest, Received, TokenEvent
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

LENGTH = 12
PROMPT = prompt_of(20, 42)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder, dtype=getattr(torch, request.param))
    # Forced tokens are counted where they are computed, not found.
    cluster = LocalCluster(folder, limits=Limits(32, 64, 256), prefix_cache=False)
    yield cluster
    cluster.close()


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
    assert cluster.engine.replayed - before == ({"equal": count} if count else {})
    assert cluster.scheduler.num_free_pages == 512


def test_forced_tokens_are_computed_one_to_a_step_as_the_first_time(cluster: LocalCluster) -> None:
    request = asked("shapes")
    first = len(cluster.transport.frames)
    [[whole]] = cluster.generate(request)
    again = len(cluster.transport.frames)
    cluster.generate(resumed(request, Received(whole.token_ids[: LENGTH - 1])))
    frames = cluster.transport.frames
    assert [(f.layer_id, f.num_tokens_per_expert, bytes(f.rows)) for f in frames[first:again]] == [
        (f.layer_id, f.num_tokens_per_expert, bytes(f.rows)) for f in frames[again:]
    ]


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
