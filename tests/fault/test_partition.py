"""The controller hears no actor, is not the newest any more, or has a wrong map: nothing is lost.

:mod:`tests.long.test_partition` cuts real network links.
"""

from __future__ import annotations

from cluster.controller.records.ledger import LedgerStore
from cluster.ray_private import ray_store
from tests.cluster_fixture import APP, RANDOM, ServedCluster, greedy, wait_until
from tests.fault.faults import (
    PROMPTS,
    expected_tokens,
    kill,
    let_go,
    start_streams,
    stopped,
)
from tests.fault.test_expert_loss import check_replaced

LENGTH = 20
BACK_S = 40.0
CUT_OFF = "the controller itself may be cut off"


def test_actors_that_all_fall_silent_together_are_kept(served: ServedCluster) -> None:
    """No router waits for them, so nobody knows whether they or the controller are cut off."""
    told, before = served.status(), served.actors()
    pids = [actor.pid for actor in before.values()]
    with stopped(told, *pids):
        wait_until(
            lambda: all(CUT_OFF in actor.silence for actor in served.actors().values()),
            "the status says why they are kept",
        )
        for pid in pids:
            let_go(told, pid)
        wait_until(
            lambda: not any(actor.silence for actor in served.actors().values()), "all are heard"
        )
    answers = served.crowd(RANDOM, PROMPTS[:2], [greedy(LENGTH)] * 2)
    assert answers == [served.expected(prompt, LENGTH) for prompt in PROMPTS[:2]]
    check_replaced(before, served.actors(), [])


def test_a_controller_that_is_not_the_newest_ends_and_replaces_nobody(
    served: ServedCluster,
) -> None:
    told, before = served.status(), served.actors()
    streams = start_streams(served)
    claimed = LedgerStore(APP, ray_store()).claim()
    assert claimed.epoch == told.epoch + 1
    kill(told, before["expert-1"].pid)
    after = wait_until(
        lambda: fresh if (fresh := served.status()).epoch > claimed.epoch else None,
        "the next controller answers",
        BACK_S,
    )
    assert after.controller_pid != told.controller_pid
    assert [stream.result() for stream in streams] == expected_tokens(served)
    served.wait_whole()
    check_replaced(before, served.actors(), ["expert-1"])
    # The older one has written nothing: its successor of the killed actor would be one more.
    assert served.actors()["expert-1"].generation == before["expert-1"].generation + 1
