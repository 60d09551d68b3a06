"""Copies follow the load while streams run: nothing fails, no token and no expert changes."""

from __future__ import annotations

import time

import numpy as np

from tests.cluster_fixture import (
    LAYERS,
    NUM_EXPERTS,
    RANDOM,
    ServedCluster,
    StreamReader,
    greedy,
    prompt_of,
)

STREAMS, TOKENS, BETWEEN_S = 8, 200, 0.3


def test_rebalancing_again_and_again_under_streams_changes_no_token(served: ServedCluster) -> None:
    prompts = [prompt_of(4 + i, seed=70 + i) for i in range(STREAMS)]
    expected = [served.expected(prompt, TOKENS) for prompt in prompts]
    before = {actor_id: actor.pid for actor_id, actor in served.actors().items()}
    sampling = greedy(TOKENS, return_routed_experts=True)
    [undisturbed] = served.client.generate(prompts[0], sampling, model=RANDOM)
    streams = [StreamReader(served.client, prompt, sampling, model=RANDOM) for prompt in prompts]
    outcomes, moved = [], 0
    for stream in streams:
        while not stream.ended:
            report = served.client.rebalance()
            outcomes.append(report.outcome)
            moved += sum(move.is_added for move in report.moves)
            began_s = time.monotonic()
            while not stream.ended and time.monotonic() - began_s < BETWEEN_S:
                stream.wait_change(0.1)
    assert [stream.result() for stream in streams] == expected
    parts = [p.routed_experts for p in streams[0].pieces if p.routed_experts is not None]
    assert np.array_equal(np.concatenate(parts), undisturbed.routed_experts)
    assert set(outcomes) <= {"committed", "balanced"}
    assert outcomes.count("committed") >= 1
    assert moved >= 1
    told = served.wait_whole()
    assert {actor.actor_id: actor.pid for actor in told.actors} == before
    held = [expert for actor in told.actors for expert in actor.experts]
    assert len(held) == len(set(held)) == sum(LAYERS[model] * NUM_EXPERTS for model in LAYERS)
    load = served.client.load()
    assert load.rebalances[0].outcome == "committed"
    assert sum(device.tokens_per_s for device in load.devices) > 0
    assert served.client.rebalance(dry_run=True).outcome in {"planned", "balanced"}
