"""In half precision a request has the same bits alone and through whatever becomes of a deployment.

Tokens and log probabilities are compared: of a request alone, and of the same in a crowd whose
prompts come in chunks, while an actor is killed, while actors come and go, and where another router
goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cluster.native import native
from tests.cluster_fixture import (
    NUM_ACTORS,
    RANDOM,
    ServedCluster,
    StreamReader,
    deploy,
    greedy,
    prompt_of,
    wait_until,
)
from tests.fault.faults import kill

LENGTH, BEFORE, BACK_S = 40, 2, 120.0
PROMPTS = [prompt_of(length, 70 + length) for length in (3, 17, 60, 140, 180, 199, 210, 215)]
"""More tokens than a step takes."""
SAMPLING = greedy(LENGTH, logprobs=3)
Bits = tuple[tuple[int, ...], tuple[Any, ...]]

pytestmark = pytest.mark.timeout(600)


def bits_of(pieces: Sequence[Any]) -> Bits:
    """Return the tokens of an answer, and what was told of each."""
    ids = tuple(token_id for piece in pieces for token_id in piece.token_ids)
    return ids, tuple(row for piece in pieces for row in piece.logprobs)


def is_healed(served: ServedCluster) -> bool:
    told = served.status()
    return told.missing_experts == 0 and len(told.routers) == len(told.models)


def in_crowd(served: ServedCluster, event: Callable[[], Any]) -> list[Bits]:
    """Return all answers, asked together; ``event`` comes while all of them are under way."""
    streams = [StreamReader(served.client, p, SAMPLING, RANDOM, BACK_S) for p in PROMPTS]
    for stream in streams:
        stream.wait_tokens(BEFORE)
    assert not any(stream.ended for stream in streams)
    event()
    for stream in streams:
        assert len(stream.result(BACK_S)) == LENGTH
    wait_until(lambda: is_healed(served), "all experts and routers are there", BACK_S)
    return [bits_of(stream.pieces) for stream in streams]


@pytest.fixture(params=[] if native is None else ["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, served: ServedCluster) -> ServedCluster:
    """Give the cluster with the random model in half precision."""
    models = [
        {**model, "dtype": request.param} if model["id"] == RANDOM else model
        for model in served.args["models"]
    ]
    deploy({**served.args, "models": models})
    served.wait_whole(BACK_S)
    served.changed.set()
    return served


def test_company_kills_scaling_and_other_routers_change_no_bit(half: ServedCluster) -> None:
    alone = [
        bits_of([half.client.generate(prompt, SAMPLING, model=RANDOM)[0]]) for prompt in PROMPTS
    ]
    assert all(len(ids) == len(rows) == LENGTH for ids, rows in alone)

    def kill_actor() -> None:
        kill(half.status(), half.actors()["expert-1"].pid)

    def kill_routers() -> None:
        told = half.status()
        kill(told, *(router.pid for router in told.routers))

    events: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "an actor is killed": kill_actor,
        "actors come": lambda: half.client.scale(NUM_ACTORS + 1),
        "actors go": lambda: half.client.scale(NUM_ACTORS - 1),
        "as many as before": lambda: half.client.scale(NUM_ACTORS),
        "the routers are killed": kill_routers,
    }
    for name, event in events.items():
        assert in_crowd(half, event) == alone, name
