"""Whether experts of an earlier model stay, and until when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.placement.retained import Retention, experts_bytes, fits_beside
from cluster.spec import ActorReport, ExpertKey, ModelExperts

OWN = {"new": ModelExperts("new", (0,), 4, 10)}
EARLIER = {"old": ModelExperts("old", (0,), 4, 30)}


def report(
    actor_id: str, *keys: ExpertKey, node: str = "n", device: str = "cpu", free_bytes: int = 1000
) -> ActorReport:
    return ActorReport(
        actor_id, 1, "", 1, 1, node, device, keys, 0, {}, 0, 0, free_bytes=free_bytes
    )


def keys(model: str, *expert_ids: int) -> list[ExpertKey]:
    return [ExpertKey(model, 0, expert_id) for expert_id in expert_ids]


@pytest.mark.parametrize(("budget", "fits"), [(80, True), (79, False)])
def test_a_budget_holds_the_share_and_what_is_retained(budget: int, fits: bool) -> None:
    shares = {"a": keys("new", 0, 1), "b": keys("new", 2, 3)}
    reports = {"a": report("a", *keys("old", 0, 1)), "b": report("b", *keys("old", 0))}
    budgets = {"a": budget, "b": 50}
    assert fits_beside(shares, reports, OWN, EARLIER, budgets) is fits


@pytest.mark.parametrize(
    ("free_bytes", "first", "second", "fits"),
    [
        (45, {}, {}, True),  # two actors of a node load 20 each, into nine tenths of its memory
        (44, {}, {}, False),
        (23, {}, {"node": "m"}, True),  # each on a node of its own
        (21, {}, {"node": "m"}, False),
        (23, {}, {"device": "cuda:0"}, True),  # each with a device of its own
        (21, {}, {"device": "cuda:0"}, False),
        (45, {"device": "cuda:0"}, {"device": "cuda:0"}, True),  # two shares of one card
        (44, {"device": "cuda:0"}, {"device": "cuda:0"}, False),
        (23, {"device": "cuda:0"}, {"device": "cuda:1"}, True),
        (21, {"device": "cuda:0"}, {"device": "cuda:1"}, False),
        (23, {"device": "emulated"}, {"device": "emulated"}, True),
    ],
)
def test_without_budgets_new_experts_must_find_free_memory(
    free_bytes: int, first: dict[str, str], second: dict[str, str], fits: bool
) -> None:
    shares = {"a": keys("new", 0, 1), "b": keys("new", 2, 3)}
    reports = {
        "a": report("a", *keys("old", 0), free_bytes=free_bytes, **first),
        "b": report("b", *keys("old", 1), free_bytes=free_bytes, **second),
    }
    assert fits_beside(shares, reports, OWN, EARLIER, None) is fits


@pytest.mark.parametrize(("free_bytes", "fits"), [(45, True), (44, False)])
def test_actors_that_are_not_there_yet_need_memory_too(free_bytes: int, fits: bool) -> None:
    shares = {"a": keys("new", 0), "b": keys("new", 1), "c": keys("new", 2, 3)}
    reports = {"a": report("a", *keys("old", 0), free_bytes=free_bytes)}
    assert fits_beside(shares, reports, OWN, EARLIER, None) is fits
    elsewhere = report("b", *keys("old", 1), node="m", free_bytes=(free_bytes + 1) // 2)
    reports = {"a": replace(reports["a"], free_bytes=elsewhere.free_bytes), "b": elsewhere}
    assert fits_beside(shares, reports, OWN, EARLIER, None) is fits


def test_experts_that_are_held_already_need_no_memory_and_others_models_weigh_nothing() -> None:
    held = [*keys("new", 0, 1), *keys("old", 0), *keys("other", 0)]
    assert fits_beside(
        {"a": keys("new", 0, 1)}, {"a": report("a", *held, free_bytes=0)}, OWN, EARLIER, None
    )
    assert experts_bytes(held, OWN) == 20


def test_a_model_goes_when_its_routers_are_silent() -> None:
    retention = Retention(100.0, 15.0, 600.0)
    assert retention.over(["old"], [], False, 115.0) == {}  # they may not have called yet
    assert retention.over(["old"], ["old"], False, 120.0) == {}
    assert retention.over(["old"], ["new"], False, 135.0) == {}
    assert list(retention.over(["old", "older"], ["new"], False, 135.1)) == ["old", "older"]


def test_the_time_to_drain_begins_when_the_new_model_is_whole() -> None:
    retention = Retention(0.0, 15.0, 60.0)
    for now_s in range(0, 1000, 10):
        assert retention.over(["old"], ["old"], False, float(now_s)) == {}
    assert retention.over(["old"], ["old"], True, 1000.0) == {}
    assert retention.over(["old"], ["old"], False, 1060.0) == {}  # an actor died meanwhile
    assert "60 s" in retention.over(["old"], ["old"], True, 1060.1)["old"]
