"""What readiness is decided by: every expert of every served model has a live copy."""

from __future__ import annotations

import pytest

from cluster.placement.placement import Placement, empty_placement
from cluster.spec import ModelExperts
from router.control.readiness import Readiness, is_its_turn, model_readiness, readiness

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


@pytest.mark.parametrize(
    ("placement", "reason", "order"),
    [
        (placed(MODELS[0]), "no placement of the experts of b, c is known yet", (4, 1)),
        (None, "no placement of the experts is known yet", None),
    ],
)
def test_without_a_placement_of_every_model_it_is_not_ready(
    placement: Placement | None, reason: str, order: tuple[int, int] | None
) -> None:
    told = readiness(placement, ["a", "c", "b"], None)
    assert told == Readiness(reason, order, None)
    assert not told.is_ready


def test_one_model_is_ready_whatever_others_miss() -> None:
    key = MODELS[1].expert_keys()[1]
    both = placed(*MODELS)
    lost = both.without("expert-0").with_actor("expert-1", 1, MODELS[0].expert_keys())
    assert model_readiness(both, "b", 0.5).is_ready
    assert model_readiness(lost, "a", 0.5) == Readiness("", lost.order, 0.5)
    assert model_readiness(lost, "b", 0.5).reason == "2 experts have no live copy"
    back = lost.with_actor("expert-2", 1, [MODELS[1].expert_keys()[0]])
    assert model_readiness(back, "b", 0.5).reason == "1 experts have no live copy"
    assert model_readiness(back, "b", 0.5, "drop").is_ready
    assert back.missing() == [key]
    assert model_readiness(both, "c", 0.5).reason == "no placement of the experts of c is known yet"
    assert not model_readiness(None, "a", None).is_ready


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


OLD, NEW = ModelExperts("a@1", (0, 1), 2, 1), ModelExperts("a@2", (0, 1), 2, 1)


def test_during_a_redeploy_the_earlier_model_serves_for_its_successor() -> None:
    both = empty_placement(1, [OLD, NEW])
    old = both.with_actor("x", 1, OLD.expert_keys())
    assert not readiness(both, ["a"], 1.0).is_ready
    assert readiness(old, ["a"], 1.0).is_ready
    assert readiness(old.with_actor("y", 1, NEW.expert_keys()), ["a"], 1.0).is_ready
    assert readiness(old.without_models({"a@1"}), ["a"], 1.0).reason == (
        "4 experts have no live copy"
    )


@pytest.mark.parametrize(
    ("models", "held", "is_turn"),
    [
        ([], [], True),  # of another application's model: nothing to wait for
        ([NEW], [], True),  # a first start serves as experts come
        ([OLD], [OLD], False),  # the controller does not know of the redeploy yet
        ([OLD, NEW], [OLD], False),
        ([OLD, NEW], [OLD, NEW], True),
        ([OLD, NEW], [NEW], True),
        ([NEW, MODELS[1]], [], True),
    ],
)
def test_a_new_router_waits_for_its_experts_where_earlier_ones_serve(
    models: list[ModelExperts], held: list[ModelExperts], is_turn: bool
) -> None:
    placement = empty_placement(1, models)
    for model in held:
        placement = placement.with_actor(f"of {model.model}", 1, model.expert_keys())
    assert is_its_turn(placement, "a@2") is is_turn
    assert not is_its_turn(None, "a@2")
