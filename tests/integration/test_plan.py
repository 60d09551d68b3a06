"""What ``expertmesh plan`` says of models, against the processes that serve them."""

from __future__ import annotations

import json
from collections import Counter

import psutil
import pytest

from router.ops.plan.plan import ACTOR_PROCESS_BYTES, Plan, Wish, make_plan
from router.ops.plan.source import find_model
from tests.cluster_fixture import NUM_ACTORS, RANDOM, TINY, ServedCluster
from tests.integration.test_status_and_cli import run, status_json


def plans(served: ServedCluster) -> dict[str, Plan]:
    """Return the plan of each served model."""
    models = {TINY: "mesh-tiny", RANDOM: str(served.random_folder)}
    return {name: make_plan(find_model(model), Wish()) for name, model in models.items()}


def test_planned_bytes_are_those_that_the_actors_hold(served: ServedCluster) -> None:
    planned, told = plans(served), status_json(served)
    resident = 0
    for actor in told["actors"]:
        held = Counter(model for model, _, _ in actor["experts"])
        expected = sum(planned[model].expert_bytes * count for model, count in held.items())
        assert actor["weight_bytes"] == expected
        resident += actor["weight_bytes"]
    assert resident == told["live_copies"] * sum(one.all_experts_bytes for one in planned.values())


def test_an_actors_process_takes_a_third_of_the_plan_on_a_cpu(served: ServedCluster) -> None:
    for actor in served.status().actors:
        rss = psutil.Process(actor.pid).memory_info().rss
        assert rss == pytest.approx(actor.weight_bytes + ACTOR_PROCESS_BYTES / 3, rel=0.25)


def test_the_command_plans_the_served_checkpoint(served: ServedCluster) -> None:
    done = run("plan", str(served.random_folder), "--devices", str(NUM_ACTORS), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["all_experts_bytes"] == plans(served)[RANDOM].all_experts_bytes
    assert told["model"]["shape"]["model_type"] == "mixtral"
