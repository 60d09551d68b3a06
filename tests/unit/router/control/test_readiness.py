"""What readiness is decided by: every expert of every served model has a live copy."""

from __future__ import annotations

from cluster.placement.placement import Placement, empty_placement
from cluster.spec import ModelExperts
from router.control.readiness import Readiness, readiness

MODELS = [ModelExperts("a", (0, 1), 2, 1), ModelExperts("b", (0,), 2, 1)]


def placed(*models: ModelExperts) -> Placement:
    """Return a placement in which one actor holds everything."""
    keys = [key for model in models for key in model.expert_keys()]
    return empty_placement(4, models).with_actor("expert-0", 1, keys)


def test_it_is_ready_when_every_expert_has_a_copy() -> None:
    told = readiness(placed(*MODELS), ["a", "b"], 0.5)
    assert told == Readiness("", (4, 1), 0.5)
    assert told.is_ready


def test_one_lost_expert_is_enough_not_to_be_ready_and_another_copy_to_be() -> None:
    key = MODELS[1].expert_keys()[1]
    twice = placed(*MODELS).with_actor("expert-1", 1, [key])
    lost = twice.without("expert-0")
    assert readiness(twice.without("expert-1"), ["a", "b"], 0.5).is_ready
    assert not readiness(lost, ["a", "b"], 0.5).is_ready
    assert readiness(lost, ["a", "b"], 0.5).reason == "5 experts have no live copy"
    back = lost.with_actor("expert-0", 2, [k for m in MODELS for k in m.expert_keys()])
    assert readiness(back, ["a", "b"], 0.5).is_ready


def test_a_served_model_that_the_placement_does_not_know_is_not_ready() -> None:
    told = readiness(placed(MODELS[0]), ["a", "c", "b"], None)
    assert told == Readiness("no placement of the experts of b, c is known yet", (4, 1), None)


def test_without_a_placement_it_is_not_ready() -> None:
    told = readiness(None, ["a"], None)
    assert told == Readiness("no placement of the experts is known yet", None, None)
    assert not told.is_ready


def test_the_age_of_the_controllers_loop_alone_changes_nothing() -> None:
    assert readiness(placed(*MODELS), ["a"], 3600.0).is_ready


def test_a_contract_that_goes_on_without_an_expert_is_ready_without_it() -> None:
    first, *others = MODELS[0].expert_keys()
    lost = placed(*MODELS).with_actor("expert-1", 1, others).without("expert-0")
    lost = lost.with_actor("expert-2", 1, MODELS[1].expert_keys())
    assert lost.missing() == [first]
    assert not readiness(lost, ["a", "b"], 0.5, "strict").is_ready
    assert readiness(lost, ["a", "b"], 0.5, "next_expert").is_ready
    assert readiness(lost, ["a", "b"], 0.5, "drop").is_ready


def test_a_lost_layer_has_no_next_expert() -> None:
    whole = [key for key in MODELS[0].expert_keys() if key.layer_id == 1]
    lost = placed(*MODELS).with_actor("expert-1", 1, whole).without("expert-0")
    told = readiness(lost, ["a", "b"], 0.5, "next_expert")
    assert told.reason == "4 experts have no live copy"
    assert readiness(lost, ["a", "b"], 0.5, "drop").is_ready
