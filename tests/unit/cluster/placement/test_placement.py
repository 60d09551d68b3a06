"""Placement: who holds which expert, and the names that actors go by."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from itertools import chain, product
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID

from cluster import spec
from cluster.controller.lifecycle import lease
from cluster.controller.records.ledger import LedgerStore
from cluster.errors import ConfigError
from cluster.placement.change import Change, with_change
from cluster.placement.placement import Placement, assign_experts, empty_placement, surplus
from cluster.ray_private import MemoryStore
from cluster.spec import (
    ActorSpec,
    ExpertKey,
    ModelExperts,
    ModelSource,
    actor_name,
    model_id_of,
    model_key,
    parse_actor_name,
)

RELATED_NAMES = st.lists(
    st.one_of(st.sampled_from(":/#%@"), st.sampled_from(["a", "b", "g1", "ledger", "%3A", "\n"]))
    | st.text(min_size=1, max_size=9),
    min_size=1,
    max_size=6,
).map(lambda parts: {"".join(parts[:end]) for end in range(1, len(parts) + 1)})
"""Names that begin as each other."""
ACTORS = st.integers(1, 9).map(lambda count: [f"expert-{i}" for i in range(count)])
MODELS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True), st.integers(1, 17)
    ),
    min_size=1,
    max_size=3,
).map(
    lambda sizes: [
        ModelExperts(f"m{i}", tuple(sorted(layers)), experts, 10)
        for i, (layers, experts) in enumerate(sizes)
    ]
)


def test_experts_are_dealt_out_as_worked_by_hand() -> None:
    shares = assign_experts([ModelExperts("m", (0, 1), 4, 1)], ["a", "b", "c"], None)
    assert shares == {
        "a": [("m", 0, 0), ("m", 0, 3), ("m", 1, 2)],
        "b": [("m", 0, 1), ("m", 1, 0), ("m", 1, 3)],
        "c": [("m", 0, 2), ("m", 1, 1)],
    }


@given(MODELS, ACTORS, st.integers(1, 9))
def test_each_expert_gets_its_copies_on_different_actors_and_layers_stay_even(
    models: list[ModelExperts], actor_ids: list[str], copies: int
) -> None:
    copies = min(copies, len(actor_ids))
    shares = assign_experts(models, actor_ids, None, copies)
    assert list(shares) == actor_ids
    assert assign_experts(models, actor_ids, None, copies) == shares
    assert all(len(set(keys)) == len(keys) for keys in shares.values())
    held = Counter(key for keys in shares.values() for key in keys)
    assert held == {key: copies for model in models for key in model.expert_keys()}
    layers = {(key.model, key.layer_id) for key in held}
    for layer in layers:
        of_layer = [sum(key[:2] == layer for key in keys) for keys in shares.values()]
        assert max(of_layer) - min(of_layer) <= 1


def test_the_copies_of_what_one_actor_holds_are_spread_over_the_others() -> None:
    shares = assign_experts([ModelExperts("m", (0,), 12, 1)], ["a", "b", "c", "d"], None, 2)
    for actor_id, keys in shares.items():
        others = [len({*keys} & {*other}) for a, other in shares.items() if a != actor_id]
        assert others == [2, 2, 2]


@given(MODELS, st.lists(st.sampled_from("xyz"), min_size=2, max_size=8), st.integers(2, 3))
def test_copies_sit_on_different_nodes_as_far_as_there_are_several(
    models: list[ModelExperts], placed: list[str], copies: int
) -> None:
    copies = min(copies, len(placed))
    nodes = {f"expert-{i}": node for i, node in enumerate(placed)}
    shares = assign_experts(models, list(nodes), None, copies, nodes)
    for model in models:
        for key in model.expert_keys():
            holders = [actor_id for actor_id, keys in shares.items() if key in keys]
            assert len(holders) == copies
            assert len({nodes[a] for a in holders}) == min(copies, len(set(placed)))


def test_an_actor_whose_node_is_not_known_counts_as_one_on_a_node_of_its_own() -> None:
    model = ModelExperts("m", (0,), 6, 1)
    shares = assign_experts([model], ["a", "b", "c"], None, 2, {"a": "x", "b": "x"})
    assert not {*shares["a"]} & {*shares["b"]}
    assert len(shares["c"]) == 6


def test_what_is_held_is_kept_and_a_lost_actors_successor_gets_what_it_held() -> None:
    models = [ModelExperts("m", (0, 1, 2), 7, 1)]
    actor_ids, nodes = ["a", "b", "c", "d"], {"a": "x", "b": "x", "c": "y", "d": "z"}
    before = assign_experts(models, actor_ids, None, 2, nodes)
    assert assign_experts(models, actor_ids, None, 2, nodes, before) == before
    for lost in actor_ids:
        held = {actor_id: keys for actor_id, keys in before.items() if actor_id != lost}
        known = {actor_id: node for actor_id, node in nodes.items() if actor_id != lost}
        after = assign_experts(models, actor_ids, None, 2, known, held)
        assert {k: set(v) for k, v in after.items() if k != lost} == {
            k: set(v) for k, v in held.items()
        }, lost


def test_more_copies_than_actors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"number of actors, 2 \(given: 3\)") as caught:
        assign_experts([ModelExperts("m", (0,), 2, 1)], ["a", "b"], None, 3)
    assert caught.value.field == "args.experts.min_copies"


def test_a_placement_tells_the_copies_of_the_expert_that_has_the_fewest() -> None:
    model = ModelExperts("m", (2, 5), 1, 1)
    keys = model.expert_keys()
    placement = empty_placement(4, [model])
    assert (placement.order, placement.generations) == ((4, 0), {})
    assert placement.missing() == [("m", 2, 0), ("m", 5, 0)]
    assert (Placement(1, 0, {}, {}).fewest_copies(), placement.fewest_copies()) == (0, 0)
    both = placement.with_actor("a", 1, keys).with_actor("b", 1, keys[:1])
    assert both.fewest_copies() == 1
    assert both.with_actor("c", 1, keys[1:]).fewest_copies() == 2


def test_a_share_may_fill_the_budget_and_not_exceed_it() -> None:
    models = [ModelExperts("m", (0, 1), 3, 100), ModelExperts("n", (0,), 2, 7)]
    # By hand: a gets m(0,0), m(0,2), m(1,1), n(0,0) = 307 bytes, b the rest.
    assert len(assign_experts(models, ["a", "b"], {"a": 307, "b": 307})["a"]) == 4
    message = "budgets of 612 bytes in all cannot hold 614 bytes of whole experts"
    with pytest.raises(ConfigError, match=message) as caught:
        assign_experts(models, ["a", "b"], {"a": 306, "b": 306})
    assert caught.value.field == "args.experts.memory_budget_bytes"


def test_an_actors_share_is_in_proportion_to_its_budget() -> None:
    models = [ModelExperts("m", (0, 1, 2), 8, 10)]
    shares = assign_experts(models, ["gpu", "cpu"], {"gpu": 300, "cpu": 100})
    for layer_id in range(3):
        assert [sum(k.layer_id == layer_id for k in s) for s in shares.values()] == [6, 2]
    # A small one gets its part over all layers, where it would get none of any single one.
    shares = assign_experts(models, ["gpu", "cpu"], {"gpu": 1100, "cpu": 100})
    assert [len(share) for share in shares.values()] == [22, 2]


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_experts_fit_into_the_budgets_whenever_there_is_a_way(
    rooms: list[int], layers: int, experts: int, copies: int, on_one_node: bool
) -> None:
    copies = min(copies, len(rooms))
    model = ModelExperts("m", tuple(range(layers)), experts, 10)
    budgets = {f"a{i}": 10 * room + 9 for i, room in enumerate(rooms)}
    nodes = dict.fromkeys(budgets, "x") if on_one_node else {}
    num_experts = layers * experts
    # Equal things in distinct boxes: there is a way exactly when this many places are of use.
    if sum(min(room, num_experts) for room in rooms) < copies * num_experts:
        with pytest.raises(ConfigError):
            assign_experts([model], list(budgets), budgets, copies, nodes)
        return
    shares = assign_experts([model], list(budgets), budgets, copies, nodes)
    assert all(10 * len(share) <= budgets[actor] for actor, share in shares.items())
    held = Counter(key for share in shares.values() for key in share)
    assert held == dict.fromkeys(model.expert_keys(), copies)
    assert all(len(set(share)) == len(share) for share in shares.values())


def test_what_is_held_is_let_go_where_a_budget_has_become_too_small() -> None:
    model = ModelExperts("m", (0,), 6, 10)
    held = assign_experts([model], ["a", "b"], {"a": 40, "b": 20})
    assert [len(share) for share in held.values()] == [4, 2]
    same = assign_experts([model], ["a", "b"], {"a": 40, "b": 30}, held=held)
    assert same == held
    less = assign_experts([model], ["a", "b"], {"a": 30, "b": 30}, held=held)
    assert [len(share) for share in less.values()] == [3, 3]


def placement_of(models: list[ModelExperts], shares: dict[str, list[ExpertKey]]) -> Placement:
    placement = empty_placement(3, models)
    for generation, (actor_id, keys) in enumerate(shares.items(), start=1):
        placement = placement.with_actor(actor_id, generation, keys)
    return placement


def test_an_actor_that_comes_adds_copies_and_one_that_goes_takes_its_own_only() -> None:
    model = ModelExperts("m", (0,), 3, 1)
    keys = model.expert_keys()
    first = empty_placement(1, [model]).with_actor("a", 4, keys[:2])
    assert first.missing() == [keys[2]]
    both = first.with_actor("b", 9, keys[1:])
    assert both.missing() == []
    assert both.holders == {keys[0]: ("a",), keys[1]: ("a", "b"), keys[2]: ("b",)}
    assert both.generations == {"a": 4, "b": 9}
    left = both.without("a")
    assert left.holders == {keys[0]: (), keys[1]: ("b",), keys[2]: ("b",)}
    assert left.generations == {"b": 9}
    assert left.missing() == [keys[0]]
    assert [p.order for p in (first, both, left)] == [(1, 1), (1, 2), (1, 3)]
    assert first.holders[keys[1]] == ("a",)  # earlier versions are untouched
    # An actor that comes again is listed once, and brings no expert that no model has.
    again = both.with_actor("a", 5, [*keys[:2], ExpertKey("other", 0, 0)])
    assert {key: sorted(actors) for key, actors in again.holders.items()} == {
        key: list(actors) for key, actors in both.holders.items()
    }
    assert again.generations == {"a": 5, "b": 9}


def test_copies_that_are_retired_leave_the_map_and_nothing_else() -> None:
    model = ModelExperts("m", (0,), 2, 1)
    first, second = model.expert_keys()
    both = empty_placement(1, [model]).with_actor("a", 4, [first, second])
    both = both.with_actor("b", 9, [first, second])
    left = with_change(both, Change({}, {"a": [second]}))
    assert left.holders == {first: ("a", "b"), second: ("b",)}
    assert (left.generations, left.order) == (both.generations, (1, 3))


def test_only_what_all_who_are_to_hold_it_do_hold_is_surplus() -> None:
    model = ModelExperts("m", (0,), 3, 1)
    keys = model.expert_keys()
    shares = {"a": keys[:1], "b": keys[1:2], "c": keys[2:]}
    placement = empty_placement(1, [model]).with_actor("a", 1, keys).with_actor("b", 1, keys[1:2])
    assert surplus(placement, shares, keys[1:]) == [keys[1]]
    assert surplus(placement.with_actor("c", 1, keys[2:]), shares, keys[1:]) == keys[1:]
    assert surplus(placement.without("b"), shares, keys[1:]) == []
    assert surplus(placement, shares, []) == []


@given(MODELS, st.integers(1, 5), st.data())
def test_fewer_copies_are_chosen_from_those_that_are_there(
    models: list[ModelExperts], num_actors: int, data: st.DataObject
) -> None:
    actor_ids = [f"expert-{i}" for i in range(num_actors)]
    before, after = sorted(data.draw(st.lists(st.integers(1, num_actors), min_size=2, max_size=2)))
    held = assign_experts(models, actor_ids, None, after)
    kept = assign_experts(models, actor_ids, None, before, held=held)
    assert all(set(kept[actor]) <= set(held[actor]) for actor in actor_ids)
    copies = Counter(key for share in kept.values() for key in share)
    assert set(copies.values()) == {before}
    assert copies.keys() == {key for model in models for key in model.expert_keys()}


@given(MODELS, ACTORS)
def test_a_placement_survives_a_call_of_ray(
    models: list[ModelExperts], actor_ids: list[str]
) -> None:
    placement = placement_of(models, assign_experts(models, actor_ids, None)).without("expert-0")
    read = pickle.loads(pickle.dumps(placement))
    assert read == placement
    assert all(type(key) is ExpertKey for key in read.holders)
    assert read.missing() == placement.missing()


@given(st.data())
def test_an_application_finds_its_own_actors_and_ledger_and_no_others(data: st.DataObject) -> None:
    apps, actor_ids = data.draw(RELATED_NAMES), data.draw(RELATED_NAMES)
    actors = {*product(apps, actor_ids, data.draw(st.sets(st.integers(0, 10**9), max_size=3)))}
    listed, store = [actor_name(*actor) for actor in actors], MemoryStore()
    assert len({*listed}) == len(actors)
    for app in apps:
        found = [(app, *parsed) for name in listed if (parsed := parse_actor_name(name, app))]
        assert Counter(found) == Counter(actor for actor in actors if actor[0] == app)
        ledger = LedgerStore(app, store)
        assert ledger.claim().epoch == 1
        ledger.check()
    assert len(store.values) == len(apps)


@given(RELATED_NAMES, RELATED_NAMES.map(sorted))
def test_only_replicas_of_its_own_application_keep_an_actor(
    apps: set[str], deployments: list[str]
) -> None:
    ids = [
        [ReplicaID("k3x9", DeploymentID(name.replace("#", "-"), app)) for name in deployments]
        for app in sorted(apps)
    ]
    living = [{"name": one.to_full_id_str(), "namespace": "serve"} for one in chain(*ids[1:])]
    with patch.object(lease, "list_named_actors", lambda all_namespaces: living):
        assert [app for app in sorted(apps) if lease.app_has_replicas(app)] == sorted(apps)[1:]


def test_an_actors_name_shows_what_it_was_made_of() -> None:
    assert actor_name("app", "expert-0", 3) == "expertmesh:app:expert-0:g3"
    # What looks like a generation may be a part of the actor's name.
    assert parse_actor_name("expertmesh:app:a:g1:g2", "app") == ("a:g1", 2)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "expertmesh:app",
        "expertmesh:app:",
        "expertmesh:app:expert-0",
        "expertmesh:app:expert-0:g",
        "expertmesh:app:expert-0:gx",
        "expertmesh:app:expert-0:g-1",
        "expertmesh:app:expert-0:g1.5",
        "expertmesh:app:expert-0:g1 ",
        "expertmesh:app:expert-0:g²",
        "expertmesh:other:expert-0:g1",
        "expertmesh:app2:expert-0:g1",
        "SERVE_REPLICA::app#Gateway#x",
        "x:expertmesh:app:expert-0:g1",
    ],
)
def test_other_names_are_no_actors_of_the_application(name: str) -> None:
    assert parse_actor_name(name, "app") is None


def test_a_digest_tells_apart_what_is_a_processes_for_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other weights and limits come to a living actor; nothing reloads for equal ones."""

    def spec_of(threads: int, dtype: str = "float32", max_queue_rows: int = 100) -> ActorSpec:
        model = ModelSource("path", dtype, ModelExperts("m", (0,), 2, 8), "")
        return ActorSpec("app", (model,), 0.1, 0.0, threads, max_queue_rows)

    one = spec_of(1).digest
    assert one == spec_of(1, "bfloat16").digest == spec_of(1, max_queue_rows=7).digest
    others = [
        spec_of(1),
        spec_of(2),
        replace(spec_of(1), num_gpus=1.0),
        replace(spec_of(1), app="b"),
    ]
    assert len({other.digest for other in others}) == 4
    # So are builds whose frames or reports are different.
    with monkeypatch.context() as older_build:
        older_build.setattr(spec, "FRAME_VERSION", spec.FRAME_VERSION - 1)
        assert spec_of(1).digest != one
    fields_of = spec.fields
    monkeypatch.setattr(spec, "fields", lambda kind: fields_of(kind)[:-1])
    assert spec_of(1).digest != one


def test_a_models_key_is_its_id_and_its_content() -> None:
    keys = {
        model_key(*names)
        for names in [("m", "1", "float32"), ("m", "2", "float32"), ("m", "1", "bfloat16")]
    }
    assert len(keys) == 3
    assert {model_id_of(key) for key in keys} == {"m"}
    assert model_key("m", "1", "float32") in keys
    longest = "x" * 128  # what the configuration allows
    assert len(model_key(longest, "1", "float32").encode()) < 256  # what a frame has room for
    assert model_id_of("a@b") == "a"
    assert model_id_of("plain") == "plain"


def test_an_actor_that_is_no_longer_placed_is_lost() -> None:
    placement = Placement(3, 1, {}, {"a": 1})
    assert not placement.has_lost("a", 1, 3)
    assert placement.without("a").has_lost("a", 1, 3)
    # The next controller begins without any: it has not looked yet.
    assert not Placement(4, 0, {}, {}).has_lost("a", 1, 3)
    assert Placement(4, 1, {}, {"a": 2}).has_lost("a", 1, 3)
