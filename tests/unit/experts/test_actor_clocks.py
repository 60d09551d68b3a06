"""Actors on hosts whose clocks differ from the router's host refuse no frame."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import MixtralForCausalLM

from cluster.transport.base import Call
from experts import actor as actor_module
from experts import queue as queue_module
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.experts.local_actor import local_actor
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

NUM_ACTORS, LENGTH, TIME_S = 2, 8, 20.0


@pytest.fixture(scope="module")
def plain(folder: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )


@pytest.mark.parametrize("offset_s", [-3600.0, -1.0, 1.0, 3600.0])
@pytest.mark.parametrize("copies", [1, 2])
def test_actors_whose_clocks_are_apart_from_the_routers_refuse_nothing(
    folder: Path,
    plain: MixtralForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    copies: int,
    offset_s: float,
) -> None:
    """Each host's monotonic clock has a start of its own, so it differs too."""
    clock = SimpleNamespace(
        time=lambda: time.time() + offset_s, monotonic=lambda: time.monotonic() + offset_s
    )
    for module in (actor_module, queue_module):
        monkeypatch.setattr(module, "time", clock)
    cluster = LocalCluster(folder, NUM_ACTORS, min_copies=copies)
    held = cluster.placement.holders.items()
    actors = {
        actor_id: local_actor(folder, keys=[key for key, holders in held if actor_id in holders])
        for actor_id in cluster.transport.banks
    }

    def answer(call: Call, number: int) -> bytes:
        return actors[call.actor_id].compute(b"".join(call.frame))

    cluster.transport.fail = answer
    prompt = prompt_of(4, 2)
    try:
        # With two copies an answer may take 0.25 s once it is known how long answers take.
        for name in ("first", "second"):
            [[event]] = cluster.generate(greedy_request(name, prompt, LENGTH, TIME_S))
            check_greedy(event.token_ids, plain, prompt, LENGTH)
    finally:
        cluster.close()
    assert cluster.dispatcher.retries == {}
    assert all(actor.describe().frames > 0 for actor in actors.values())
