"""How many routers and gateways their use asks for, through Serve's own delays and bounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.config import AutoscalingConfig

from cluster.errors import ConfigError
from router.app import _gateway, _router, held_requests
from router.config.deployment import parse_args
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.serve.autoscaling import BARE_S, USE, BareNodes, FollowUse, able_nodes, gateway_options
from tests.local_cluster import greedy_request

SCALING = {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 0, "downscale_delay_s": 0}
MODEL = {"id": "m", "path": "models/mesh-tiny"}


def context(uses: dict[str, float], current: int, **others: Any) -> Any:
    metrics = {USE: uses} if uses else {}
    return SimpleNamespace(
        aggregated_metrics=metrics,
        current_num_replicas=current,
        target_num_replicas=current,
        total_num_requests=0.0,
        policy_state={},
        **others,
    )


@pytest.mark.parametrize(
    ("uses", "current", "expected"),
    [
        ({"a": 0.5}, 1, 1),
        ({"a": 0.51}, 1, 2),
        ({"a": 1.5, "b": 1.5}, 2, 6),  # all that waits counts
        ({"a": 0.9}, 2, 4),  # the second has told nothing yet
        ({"a": 0.1, "b": 0.2, "c": 0.2}, 3, 1),
        ({"a": 0.0}, 3, 0),  # the bounds are Serve's
        ({}, 3, 3),
    ],
)
def test_the_number_follows_the_mean_use(
    uses: dict[str, float], current: int, expected: int
) -> None:
    assert FollowUse(0.5)(context(uses, current)) == (expected, {})


def test_serve_takes_the_policy_with_its_delays() -> None:
    args = {"models": [MODEL], "router": {"replicas": 2, "autoscaling": SCALING}}
    router = _router("Router-m", parse_args(args))
    told = router._deployment_config.autoscaling_config
    assert isinstance(told, AutoscalingConfig)
    assert (told.min_replicas, told.max_replicas, told.initial_replicas) == (1, 4, 2)
    policy = _resolve_policy_callable(told.policy)
    assert policy(context({"a": 1.4}, 1, config=told))[0] == 2


def test_without_it_the_number_is_fixed() -> None:
    config = parse_args({"models": [MODEL], "router": {"replicas": 3}, "gateway": {"replicas": 2}})
    for deployment, number in ((_router("Router-m", config), 3), (_gateway(config), 2)):
        assert isinstance(deployment, serve.Deployment)
        assert deployment._deployment_config.autoscaling_config is None
        assert deployment.num_replicas == number


def nodes(*cpus: float | None) -> list[dict[str, Any]]:
    """Return nodes as Ray lists them, with these CPUs; ``None`` is a node that has gone."""
    return [
        {"NodeID": str(n), "Alive": cpu is not None, "Resources": {"CPU": cpu} if cpu else {}}
        for n, cpu in enumerate(cpus)
    ]


@pytest.mark.parametrize(
    ("cpus", "num_cpus", "number"),
    [
        ((), 0.1, 0),
        ((4.0,), 0.1, 1),
        ((4.0, 0.1, 1.0), 0.1, 3),
        ((4.0, 0.05, None), 0.1, 1),
        ((4.0, 0.0), 0.0, 1),  # a node without any CPU is not for gateways
    ],
)
def test_nodes_that_can_hold_a_gateway_are_counted(
    cpus: tuple[float | None, ...], num_cpus: float, number: int
) -> None:
    assert len(able_nodes(nodes(*cpus), num_cpus)) == number


@pytest.mark.parametrize(("cpus", "number"), [((), 1), ((2.0,), 1), ((2.0, 2.0, 2.0), 3)])
def test_each_node_that_comes_gets_a_gateway(
    cpus: tuple[float, ...], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = parse_args({"models": [MODEL], "gateway": {"replicas": "each_node"}}).gateway
    options = gateway_options(gateway, nodes(*cpus))
    assert options["max_replicas_per_node"] == 1
    told = AutoscalingConfig(**options["autoscaling_config"])
    assert (told.min_replicas, told.initial_replicas, told.upscale_delay_s) == (1, number, 0)
    policy = _resolve_policy_callable(told.policy)
    draining: set[str] = set()
    monkeypatch.setattr("ray._private.state.state.get_draining_nodes", lambda: draining)
    for now in (cpus, (*cpus, 2.0)):
        monkeypatch.setattr("ray.nodes", lambda now=now: nodes(*now))
        assert policy(context({}, number, config=told))[0] == max(1, len(now))
    draining.add("0")  # whose gateway has no other place to go to
    assert policy(context({}, number, config=told))[0] == max(1, len(cpus))


def test_a_gateway_on_each_node_does_not_follow_its_use() -> None:
    gateway = {"replicas": "each_node", "autoscaling": SCALING}
    with pytest.raises(ConfigError, match="each_node cannot be given together with autoscaling"):
        parse_args({"models": [MODEL], "gateway": gateway})
    for wrong in ("every_node", 0, 1001, 1.5):
        with pytest.raises(ConfigError, match=r"^args\.gateway\.replicas"):
            parse_args({"models": [MODEL], "gateway": {"replicas": wrong}})


def test_gateways_let_through_what_the_most_routers_would_hold() -> None:
    sizes = {"replicas": 2, "max_batch_size": 3, "max_queue_requests": 4}
    for scaling, held in (({}, 2 * 7), ({"autoscaling": SCALING}, 4 * 7)):
        config = parse_args({"models": [MODEL], "router": sizes | scaling})
        assert held_requests(config.router) == held


@pytest.mark.parametrize("section", ["router", "gateway"])
def test_wrong_bounds_are_refused(section: str) -> None:
    for replicas, scaling, words in (
        (5, SCALING, "replicas, 5, must be from min_replicas to max_replicas"),
        (1, {**SCALING, "least": 1}, "allowed keys: downscale_delay_s, max_replicas"),
        (1, {"min_replicas": 1}, "Field required"),
    ):
        args = {"models": [MODEL], section: {"replicas": replicas, "autoscaling": scaling}}
        with pytest.raises(ConfigError) as caught:
            parse_args(args)
        assert words in str(caught.value)
        assert caught.value.field.startswith(f"args.{section}.autoscaling")


def test_a_routers_use_is_that_of_its_cache_or_of_its_batch() -> None:
    scheduler = Scheduler(Limits(4, 64, 16), num_pages=32, page_size=16)
    assert scheduler.use() == 0.0
    for number in range(2):
        scheduler.add(greedy_request(str(number), [3] * 4, 4))
    assert scheduler.use() == 0.5  # they wait
    scheduler.schedule()
    assert scheduler.use() == 0.5  # they run, on a page each
    for number in range(2, 10):
        scheduler.add(greedy_request(str(number), [3] * 4, 4))
    assert scheduler.use() == 2.5
    for sequence in scheduler.sequences():
        scheduler.finish(sequence)
    scheduler.add(greedy_request("long", [3] * 4, 16 * 24 - 4))
    scheduler.schedule()
    assert scheduler.use() == 0.75


def test_a_node_without_a_gateway_is_told_after_a_while_and_no_longer_once_it_has_one() -> None:
    bare = BareNodes()
    bare.look([], [], 0.0)
    assert bare.ids == ()
    bare.look(["a", "b", "c"], ["b"], 1.0)
    bare.look(["a", "b", "c"], ["b"], 1.0 + BARE_S - 0.1)
    assert bare.ids == ()
    bare.look(["a", "b", "c"], ["b"], 1.0 + BARE_S)
    assert bare.ids == ("a", "c")
    bare.look(["a", "b"], ["a"], 2.0 + BARE_S)  # c is gone, and b's gateway has just ended
    assert bare.ids == ()
    bare.look(["a", "b"], ["a"], 2.0 + 2 * BARE_S)
    assert bare.ids == ("b",)
