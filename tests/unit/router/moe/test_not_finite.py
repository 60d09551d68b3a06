"""Rows and logits that are NaN or infinite: damage is mended, and no token is drawn from them."""

from __future__ import annotations

import logging
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.errors import NotFiniteError
from cluster.transport.base import Call, CallFailure
from cluster.wire.frames import RowsFrame, decode, encode
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

LENGTH = 6
OUTAGE_S, MAX_FAILED = 0.3, 60
"""How long a copy cannot be reached, and how often it may be asked meanwhile by all requests."""
VALUES = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}
Tokens = list[tuple[int, ...]]
PROMPTS = [prompt_of(5, 1), prompt_of(9, 2), prompt_of(3, 3)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tokens:
    with closing(LocalCluster(folder, 3)) as cluster:
        return tokens_of(cluster)


@pytest.fixture(params=[1, 2], ids=["one copy", "two copies"])
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    with closing(LocalCluster(folder, 3, min_copies=request.param)) as cluster:
        yield cluster


def tokens_of(cluster: LocalCluster) -> Tokens:
    requests = [greedy_request(f"r{i}", prompt, LENGTH) for i, prompt in enumerate(PROMPTS)]
    return [event.token_ids for [event] in cluster.generate(*requests)]


def answer_with(cluster: LocalCluster, call: Call, value: float) -> bytes:
    """Return the actor's own answer, one value of which is replaced."""
    [answer] = cluster.transport.banks[call.actor_id].compute([cluster.transport.frames[-1]])
    wire = b"".join(encode(answer))[:-4] + struct.pack("<f", value)
    assert isinstance(decode(wire), RowsFrame)
    return wire


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_rows_that_came_damaged_are_asked_for_again(
    cluster: LocalCluster, expected: Tokens, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    damaged: Counter[str] = Counter()

    def damage(call: Call, number: int) -> bytes | None:
        if number % 5:
            return None
        damaged[call.actor_id] += 1
        return answer_with(cluster, call, value)

    cluster.transport.fail = damage
    with caplog.at_level(logging.WARNING):
        assert tokens_of(cluster) == expected
    assert damaged.total() > 3
    assert cluster.dispatcher.retries == {"not_finite": damaged.total()}
    warnings = [r for r in caplog.records if "not finite" in r.message]
    assert len(warnings) == len(damaged)  # once an actor


def test_another_copy_is_asked_and_the_first_is_avoided_from_then_on(
    folder: Path, expected: Tokens
) -> None:
    cluster = LocalCluster(folder, 3, min_copies=2)
    asked: list[str] = []

    def damage(call: Call, number: int) -> bytes | None:
        asked.append(call.actor_id)
        return answer_with(cluster, call, VALUES["nan"]) if call.actor_id == "a1" else None

    cluster.transport.fail = damage
    with closing(cluster):
        assert tokens_of(cluster) == expected
    assert cluster.dispatcher.retries == {"not_finite": 1}
    assert asked.count("a1") == 1
    assert set(cluster.suspected) == {("a1", 1)}


def test_a_copy_that_was_late_is_asked_before_the_one_whose_rows_were_not_finite(
    folder: Path, expected: Tokens
) -> None:
    cluster = LocalCluster(folder, 3, min_copies=2)
    late = cluster.placement.generations.keys() - {"a1"}
    answered: Counter[str] = Counter()

    def damage(call: Call, number: int) -> bytes | None:
        for actor_id in late:
            cluster.dispatcher._copies.note_failure(actor_id, 1, time.monotonic())
        answered[call.actor_id] += 1
        return answer_with(cluster, call, VALUES["nan"]) if call.actor_id == "a1" else None

    cluster.transport.fail = damage
    with closing(cluster):
        assert tokens_of(cluster) == expected
    assert cluster.dispatcher.retries == {"not_finite": answered["a1"]}
    assert answered["a1"] > 0


def test_while_the_other_copy_cannot_be_reached_it_is_not_asked_without_a_pause(
    folder: Path, expected: Tokens
) -> None:
    cluster = LocalCluster(folder, 3, min_copies=2)
    until_s, failed = 0.0, 0
    damaged: set[tuple[int, int]] = set()

    def damage(call: Call, number: int) -> bytes | CallFailure | None:
        nonlocal until_s, failed
        frame = cluster.transport.frames[-1]
        experts = {(frame.layer_id, expert_id) for expert_id in frame.expert_ids}
        if call.actor_id == "a1":
            until_s = until_s or time.monotonic() + OUTAGE_S
            damaged.update(experts)
            return answer_with(cluster, call, VALUES["nan"])
        if time.monotonic() >= until_s or not experts <= damaged:
            return None
        failed += 1
        assert failed < MAX_FAILED
        return CallFailure.UNREACHABLE

    cluster.transport.fail = damage
    with closing(cluster):
        assert tokens_of(cluster) == expected
    assert failed > 0


def broken(folder: Path, name: str, row: int, to: Path) -> Path:
    """Save the checkpoint with NaN in one row of a tensor."""
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            if name in tensors:
                tensors[name][row] = float("nan")
            save_file(tensors, to / file.name, {"format": "pt"})
        else:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_model_that_yields_nan_ends_its_own_request_alone(folder: Path, tmp_path: Path) -> None:
    """The embedding of a token that one prompt alone has is not a number."""
    poisoned = 7
    prompts = [[t for t in prompt if t != poisoned] for prompt in PROMPTS]
    own = greedy_request("own", [5, poisoned, 9], LENGTH)
    mates = [greedy_request(f"m{i}", prompt, LENGTH) for i, prompt in enumerate(prompts)]
    with closing(LocalCluster(folder, 3)) as plain:
        expected = [event.token_ids for [event] in plain.generate(*mates)]
    poisoned_folder = broken(folder, "model.embed_tokens.weight", poisoned, tmp_path)
    with closing(LocalCluster(poisoned_folder, 3)) as cluster:
        for request in (own, *mates):
            cluster.engine.submit(request)
        with pytest.raises(NotFiniteError):
            cluster.result(own)
        assert [cluster.result(mate)[0].token_ids for mate in mates] == expected
        assert cluster.dispatcher.retries == {}  # its hidden states were not finite to begin with


def test_an_expert_that_yields_nan_is_asked_once_more_and_then_believed(
    cluster: LocalCluster, expected: Tokens
) -> None:
    def damage(call: Call, number: int) -> bytes | None:
        is_first = cluster.transport.frames[-1].layer_id == 0
        return answer_with(cluster, call, VALUES["nan"]) if is_first else None

    cluster.transport.fail = damage
    with pytest.raises(NotFiniteError, match="not finite"):
        cluster.generate(greedy_request("r", PROMPTS[0], LENGTH))
    assert cluster.dispatcher.retries["not_finite"] >= 1
    assert cluster.suspected != []  # the controller looks at the actors
    assert cluster.dispatcher._copies.failed_lately(cluster.placement.generations, 0.0) == set()
    cluster.transport.fail = lambda call, number: None
    assert tokens_of(cluster) == expected


def test_logits_that_are_not_finite_end_the_request(folder: Path, tmp_path: Path) -> None:
    with closing(LocalCluster(broken(folder, "lm_head.weight", 11, tmp_path), 3)) as cluster:
        for sampling in ({}, {"temperature": 1.0, "logprobs": 3}, {"n": 2, "temperature": 1.0}):
            with pytest.raises(NotFiniteError):
                cluster.generate(greedy_request(str(sampling), PROMPTS[0], 2, **sampling))
        assert cluster.scheduler.sequences() == []
        assert cluster.scheduler.num_free_pages == cluster.scheduler.num_pages
