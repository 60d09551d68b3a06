"""Expert actors die or hang: no request fails, every token is right, only the lost are replaced."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from cluster.errors import Code, ExpertMeshError
from cluster.reports import ActorStatus
from cluster.spec import actor_name
from tests.cluster_fixture import (
    APP,
    RANDOM,
    ServedCluster,
    StreamReader,
    greedy,
    is_alive,
    wait_until,
)
from tests.fault.faults import (
    PROMPTS,
    actor_names,
    check_forms,
    constrained_tokens,
    expected_tokens,
    is_stopped,
    kill,
    let_go,
    start_constrained,
    start_streams,
    stopped,
    wait_stalled,
)

IMPATIENT_S = 0.3
"""Shorter than a recovery: a new process has to import torch and load its experts."""
ANSWER_S = 10.0
BEGUN_S = 5.0
REPLACED_S = 30.0


def check_replaced(
    before: dict[str, ActorStatus], after: dict[str, ActorStatus], lost: Iterable[str]
) -> None:
    """Check that exactly the lost actors have a next generation, and hold what they held."""
    assert set(before) == set(after)
    for actor_id, old in before.items():
        new = after[actor_id]
        assert new.experts == old.experts
        if actor_id in lost:
            assert new.generation > old.generation
            assert new.pid != old.pid
            assert not is_alive(old.pid)
        else:
            assert (new.pid, new.generation) == (old.pid, old.generation)


def test_streams_survive_a_killed_actor(served: ServedCluster) -> None:
    told, before = served.status(), served.actors()
    of_forms = constrained_tokens(served)
    streams = start_streams(served)
    formed = start_constrained(served)
    kill(told, before["expert-1"].pid)
    assert not any(stream.ended for stream in (*streams, *formed))
    assert [stream.result() for stream in streams] == expected_tokens(served)
    assert [stream.result() for stream in formed] == of_forms
    check_forms(formed)
    served.wait_whole()
    check_replaced(before, served.actors(), ["expert-1"])


def test_old_and_new_requests_survive_the_loss_of_all_actors_unless_they_are_impatient(
    served: ServedCluster,
) -> None:
    told, before = served.status(), served.actors()
    streams = start_streams(served)
    kill(told, *(actor.pid for actor in before.values()))
    assert not any(stream.ended for stream in streams)
    patient = StreamReader(served.client, PROMPTS[0], greedy(60), RANDOM, 60)
    impatient = StreamReader(served.client, PROMPTS[1], greedy(60), RANDOM, IMPATIENT_S)
    impatient.wait_end(20)
    assert isinstance(impatient.error, ExpertMeshError)
    assert impatient.error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
    assert IMPATIENT_S * 0.9 < impatient.took_s < ANSWER_S
    assert not patient.ended
    new = served.crowd(RANDOM, PROMPTS, [greedy(20)] * len(PROMPTS))
    expected = expected_tokens(served)
    assert patient.result() == expected[0][:60]
    assert new == [tokens[:20] for tokens in expected]
    assert [stream.result() for stream in streams] == expected
    served.wait_whole()
    check_replaced(before, served.actors(), before)


def test_a_hung_only_copy_is_soon_followed_by_the_next_and_its_requests_end_well(
    served: ServedCluster,
) -> None:
    told, before = served.status(), served.actors()
    streams = start_streams(served)
    old = before["expert-2"]
    with stopped(told, old.pid):
        stopped_s = time.monotonic()
        successor = actor_name(APP, old.actor_id, old.generation + 1)
        wait_until(lambda: successor in actor_names(APP), "the successor begins", REPLACED_S)
        begun_s = time.monotonic() - stopped_s
        print(f"the successor of a hung actor begins after {begun_s:.2f} s")
        assert begun_s <= BEGUN_S
        if is_stopped(old.pid):  # Ray may not have ended it yet
            let_go(told, old.pid)
        assert not any(stream.ended for stream in streams)
        with pytest.raises(ExpertMeshError) as impatient:
            served.client.generate(PROMPTS[0], greedy(20), model=RANDOM, timeout_s=IMPATIENT_S)
        assert impatient.value.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
        assert [stream.result() for stream in streams] == expected_tokens(served)
        wait_until(lambda: not is_alive(old.pid), "the hung process is gone", REPLACED_S)
    served.wait_whole()
    check_replaced(before, served.actors(), ["expert-2"])


def test_an_actor_that_hangs_for_a_moment_is_not_replaced(served: ServedCluster) -> None:
    told, before = served.status(), served.actors()
    streams = start_streams(served)
    paused = before["expert-0"].pid
    with stopped(told, paused):
        wait_stalled(streams)
        let_go(told, paused)
        assert [stream.result() for stream in streams] == expected_tokens(served)
    served.wait_whole()
    check_replaced(before, served.actors(), [])
