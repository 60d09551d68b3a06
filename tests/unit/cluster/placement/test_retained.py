"""Whether experts of an earlier model stay, and until when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.placement.retained import Retention, experts_bytes, fits_beside
from cluster.spec import ActorReport, ExpertKey, ModelExperts

OWN = {"new": ModelExperts("new", (0,), 4, 10)}
EARLIER = {"old": ModelExperts("old", (0,), 4, 30)}


def report(actor_id: str, *keys: ExpertKey, **fields: Any) -> ActorReport:
    given = {"node": "n", "device": "cpu", "free_bytes": 1000, **fields}
    return ActorReport(
        actor_id=actor_id,
        generation=1,
        digest="",
        epoch=1,
        pid=1,
        experts=keys,
        weight_bytes=0,
        tokens={},
        queued_rows=0,
        steps=0,
        **given,
    )


def keys(model: str, *expert_ids: int) -> list[ExpertKey]:
    return [ExpertKey(model, 0, expert_id) for expert_id in expert_ids]


def test_experts_of_unknown_models_weigh_nothing() -> None:
    assert experts_bytes([*keys("new", 0, 1), *keys("other", 0)], OWN) == 20
    assert experts_bytes([], OWN) == 0


@pytest.mark.parametrize(("budget", "fits"), [(80, True), (79, False)])
def test_a_budget_holds_the_share_and_what_is_retained(budget: int, fits: bool) -> None:
    shares = {"a": keys("new", 0, 1), "b": keys("new", 2, 3)}
    reports = {"a": report("a", *keys("old", 0, 1)), "b": report("b", *keys("old", 0))}
    budgets = {"a": budget, "b": 50}
    assert fits_beside(shares, reports, OWN, EARLIER, budgets) is fits


@pytest.mark.parametrize(
    ("free_bytes", "changes", "fits"),
    [
        (45, {}, True),  # two actors of a node load 20 each, into nine tenths of its memory
        (44, {}, False),
        (23, {"node": "m"}, True),  # each on a node of its own
        (21, {"node": "m"}, False),
        (23, {"device": "cuda:0"}, True),  # each with a device of its own
        (21, {"device": "cuda:0"}, False),
    ],
)
def test_without_budgets_new_experts_must_find_free_memory(
    free_bytes: int, changes: dict[str, str], fits: bool
) -> None:
    shares = {"a": keys("new", 0, 1), "b": keys("new", 2, 3)}
    reports = {
        "a": report("a", *keys("old", 0), free_bytes=free_bytes),
        "b": report("b", *keys("old", 1), free_bytes=free_bytes, **changes),
    }
    assert fits_beside(shares, reports, OWN, EARLIER, None) is fits


@pytest.mark.parametrize(
    ("free_bytes", "devices", "fits"),
    [
        (45, ("cuda:0", "cuda:0"), True),  # two shares of one card
        (44, ("cuda:0", "cuda:0"), False),
        (23, ("cuda:0", "cuda:1"), True),
        (21, ("cuda:0", "cuda:1"), False),
        (23, ("emulated", "emulated"), True),
    ],
)
def test_shares_of_one_card_have_one_memory(
    free_bytes: int, devices: tuple[str, str], fits: bool
) -> None:
    shares = {"a": keys("new", 0, 1), "b": keys("new", 2, 3)}
    reports = {
        actor_id: report(actor_id, *keys("old", 0), free_bytes=free_bytes, device=device)
        for actor_id, device in zip("ab", devices, strict=True)
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


def test_experts_that_are_held_already_need_no_memory() -> None:
    shares = {"a": keys("new", 0, 1)}
    reports = {"a": report("a", *keys("new", 0, 1), *keys("old", 0), free_bytes=0)}
    assert fits_beside(shares, reports, OWN, EARLIER, None)


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
