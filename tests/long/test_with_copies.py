"""Two copies of each expert: the loss of an actor delays no token for long, and changes none."""

from __future__ import annotations

import time

import pytest
from ray import serve

from router.app import build
from tests.cluster_fixture import (
    APP,
    LAYERS,
    NUM_EXPERTS,
    RANDOM,
    ServedCluster,
    Shape,
    greedy,
    is_alive,
    wait_until,
)
from tests.fault.faults import (
    PROMPTS,
    expected_tokens,
    is_stopped,
    kill,
    let_go,
    longest_gap_s,
    start_streams,
    stopped,
)

pytestmark = [
    pytest.mark.parametrize("served_session", [Shape(min_copies=2)], ids=str, indirect=True),
    pytest.mark.timeout(300),  # the first test starts a cluster of its own
]

TIMES = 4
"""Of all prompts at once: 32 streams."""
KILL_GAP_S = 0.3
"""A kill makes the longest gap between two tokens longer by at most so much."""
HANG_GAP_S = 2.0
REPLACED_S = 30.0


def test_a_killed_actors_rows_go_to_the_other_copies_at_once(served: ServedCluster) -> None:
    told, before = served.status(), served.actors()
    assert (told.min_copies, told.live_copies) == (2, 2)
    quiet = start_streams(served, times=TIMES)
    expected = expected_tokens(served) * TIMES
    assert [stream.result() for stream in quiet] == expected
    streams = start_streams(served, times=TIMES)
    kill(told, before["expert-1"].pid)
    assert not any(stream.ended for stream in streams)
    assert served.status().missing_experts == 0
    assert [stream.result() for stream in streams] == expected
    normal_s, gap_s = longest_gap_s(quiet), longest_gap_s(streams)
    print(f"longest gaps: {normal_s:.3f} s, with a kill {gap_s:.3f} s")
    assert gap_s <= normal_s + KILL_GAP_S
    served.wait_whole()
    after = served.actors()
    assert after["expert-1"].generation > before["expert-1"].generation
    assert after["expert-1"].experts == before["expert-1"].experts
    assert all(after[i].pid == before[i].pid for i in ("expert-0", "expert-2"))


def test_a_hung_actors_rows_go_to_the_other_copies_within_two_seconds(
    served: ServedCluster,
) -> None:
    told, before = served.status(), served.actors()
    streams = start_streams(served)
    hung = before["expert-2"].pid
    with stopped(told, hung):
        assert not any(stream.ended for stream in streams)
        assert [stream.result() for stream in streams] == expected_tokens(served)
        print(f"longest gap with a hung actor: {longest_gap_s(streams):.3f} s")
        assert longest_gap_s(streams) <= HANG_GAP_S
        replaced = wait_until(
            lambda: served.actors().get("expert-2") and served.actors()["expert-2"].pid != hung,
            "the hung actor is replaced",
            REPLACED_S,
        )
        assert replaced
    served.wait_whole()
    after = served.actors()
    wait_until(lambda: not is_alive(hung), "the hung actor is gone", REPLACED_S)
    assert after["expert-2"].generation > before["expert-2"].generation
    assert after["expert-2"].experts == before["expert-2"].experts


def test_an_actor_that_goes_on_after_its_rows_were_computed_elsewhere_changes_nothing(
    served: ServedCluster,
) -> None:
    told, before = served.status(), served.actors()
    streams = start_streams(served)
    hung = before["expert-0"].pid
    with stopped(told, hung):
        counts = [len(stream.token_ids) for stream in streams]
        stopped_s = time.monotonic()
        wait_until(
            lambda: all(
                stream.ended or len(stream.token_ids) > count + 1
                for stream, count in zip(streams, counts, strict=True)
            ),
            "every stream goes on",
            REPLACED_S,
        )
        assert time.monotonic() - stopped_s <= HANG_GAP_S
        if is_stopped(hung):  # else it has been replaced already
            let_go(told, hung)
        expected = expected_tokens(served)
        assert [stream.result() for stream in streams] == expected
        new = served.crowd(RANDOM, PROMPTS, [greedy(20)] * len(PROMPTS))
        assert new == [tokens[:20] for tokens in expected]
    served.wait_whole()
    after = served.actors()
    assert all(after[i].experts == before[i].experts for i in before)
    assert is_alive(hung) == (after["expert-0"].pid == hung)


def test_fewer_copies_are_deployed_by_having_the_others_let_go(served: ServedCluster) -> None:
    """The last test here: it leaves one copy of each expert."""
    before = served.actors()
    streams = start_streams(served)
    served.args["experts"]["min_copies"] = 1
    serve.run(build(served.args), name=APP, route_prefix="/")
    assert [stream.result() for stream in streams] == expected_tokens(served)
    experts = sum(LAYERS[model] * NUM_EXPERTS for model in LAYERS)

    def held() -> int:
        return sum(len(actor.experts) for actor in served.actors().values())

    wait_until(lambda: held() == experts, "one copy of each is left", REPLACED_S)
    told = served.wait_whole()
    assert (told.min_copies, told.live_copies) == (1, 1)
    assert {i: actor.pid for i, actor in served.actors().items()} == {
        i: actor.pid for i, actor in before.items()
    }
    new = served.crowd(RANDOM, PROMPTS, [greedy(20)] * len(PROMPTS))
    assert new == [tokens[:20] for tokens in expected_tokens(served)]
