"""Actors come and go, and copies move every second, under 32 streams: no token changes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import ExpertMeshError
from tests.cluster_fixture import (
    LAYERS,
    NUM_ACTORS,
    NUM_EXPERTS,
    RANDOM,
    ServedCluster,
    prompt_of,
    wait_until,
)
from tests.fault.load import Case, Load

STREAMS, LENGTH, PERIOD_S, ANSWER_S = 32, 24, 1.0, 60.0
ALL_EXPERTS = sum(layers * NUM_EXPERTS for layers in LAYERS.values())


@contextmanager
def rebalanced(served: ServedCluster) -> Iterator[Counter[str]]:
    """Rebalance every second while the block runs; yields what came of it."""
    ended, outcomes = threading.Event(), Counter[str]()

    def again() -> None:
        while not ended.wait(PERIOD_S):
            try:
                outcomes[served.client.rebalance().outcome] += 1
            except ExpertMeshError as error:
                outcomes[str(error)] += 1

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield outcomes
    finally:
        ended.set()
        thread.join()


def test_four_actors_to_one_and_back_under_streams_cost_no_token(served: ServedCluster) -> None:
    prompts = [tuple(prompt_of(4 + i, seed=90 + i)) for i in range(8)]
    cases = [Case(prompt, served.expected(prompt, LENGTH)) for prompt in prompts]
    load = Load(served.client, RANDOM, cases, STREAMS, 0, ANSWER_S)

    def more_answers() -> None:
        wanted = load.outcome().requests + STREAMS
        wait_until(lambda: load.outcome().requests >= wanted, "more answers", ANSWER_S)

    pids = []
    try:
        with rebalanced(served) as outcomes:
            for number in (4, 1, 4):
                report = served.client.scale(number)
                assert report.outcome == "committed"
                more_answers()
                told = served.status()
                assert len(told.actors) == number
                assert sum(len(actor.experts) for actor in told.actors) == ALL_EXPERTS
                pids.append({actor.pid for actor in told.actors})
    finally:
        outcome = load.end()
        served.client.scale(NUM_ACTORS)
    # Others than before were there in between: three ended, and three are new.
    assert [len(pids[0] & pids[1]), len(pids[1] & pids[2]), len(pids[0] & pids[2])] == [1, 1, 1]
    assert outcome.failures == {}
    assert outcome.requests >= 4 * STREAMS
    assert set(outcomes) <= {"committed", "balanced"}
    changes = served.client.load().changes
    assert [len(change.added) - len(change.removed) for change in changes[:4]] == [-1, 3, -3, 1]
    assert served.wait_whole().missing_experts == 0
