"""A Ray under 32 streams loses a node, gets one, and drains one; prints what came of it as JSON.

A program of its own, since its Ray cannot live in one process with the tests':
``python -m tests.fault.nodes_change FOLDER``. Serve's processes are on the head, the experts on
nodes beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.reports import ClusterStatus
from router.app import build
from router.client import Client
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import prompt_of, transformers_tokens, wait_until
from tests.fault.load import Case, Load
from tests.fault.node_loss import (
    APP,
    HEAD_CPUS,
    LIMIT_S,
    NUM_CPUS,
    actors_left,
    is_whole,
    nodes_without,
    wait_status,
)

MODEL, LENGTH, STREAMS, DEADLINE_S = "random", 24, 32, 60.0
WORKER_CPUS, ADDED_CPUS = 2, 4
"""Room for two actors, and for all of them."""


def change_nodes(cluster: Cluster, client: Client, cases: Sequence[Case]) -> dict[str, Any]:
    """Lose, add and drain a node under load; return what came of it."""
    steps: list[dict[str, Any]] = []
    before = wait_status(client, is_whole)
    lost = before.actors[0].node
    [kept] = [node.node_id for node in cluster.worker_nodes if node.node_id != lost]
    load = Load(client, MODEL, cases, STREAMS, 0, DEADLINE_S)

    def note(step: str, condition: Callable[[ClusterStatus], bool]) -> None:
        told = wait_status(client, condition)
        wanted = load.outcome().requests + 2 * STREAMS
        wait_until(lambda: load.outcome().requests >= wanted, f"answers: {step}", LIMIT_S)
        actors = [(actor.actor_id, actor.node, actor.pid) for actor in told.actors]
        steps.append({"step": step, "actors": actors, "alive": nodes_without(lost)})

    remove(cluster, lost, is_graceful=False)
    note("lost", lambda told: is_whole(told) and nodes_of(told) == {kept})
    added = cluster.add_node(num_cpus=ADDED_CPUS).node_id
    actors = len(before.actors) + 1
    more = client.scale(actors)
    note("added", lambda told: is_whole(told) and nodes_of(told) == {kept, added})
    drained = client.drain(kept[:12])
    note("drained", lambda told: is_whole(told) and nodes_of(told) == {added})
    remove(cluster, kept, is_graceful=True)
    # Successors that took too long to be waited for come all the same.
    note("removed", lambda told: is_whole(told) and len(told.actors) == actors)
    outcome = load.end()
    return {
        "kept": kept,
        "lost": lost,
        "added": added,
        "scaled": more.outcome,
        "drained": drained.outcome,
        "steps": steps,
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
    }


def nodes_of(told: ClusterStatus) -> set[str]:
    """Return the nodes that have actors."""
    return {actor.node for actor in told.actors}


def remove(cluster: Cluster, node_id: str, is_graceful: bool) -> None:
    """End all processes of a node."""
    [node] = [node for node in cluster.worker_nodes if node.node_id == node_id]
    cluster.remove_node(node, allow_graceful=is_graceful)


def main(work: Path) -> int:
    """Run; returns the exit status."""
    oracle = save_mixtral(work / MODEL)
    prompts = [tuple(prompt_of(8, seed)) for seed in range(4)]
    cases = [Case(prompt, transformers_tokens(oracle, prompt, LENGTH)) for prompt in prompts]
    args = {
        "models": [{"id": MODEL, "path": str(work / MODEL)}],
        "experts": {"actors": 2, "num_cpus": NUM_CPUS},
    }
    http_port, grpc_port = free_ports(2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        serve.start(**serve_options())
        serve.run(build(with_ports(args, http_port, grpc_port)), name=APP, route_prefix="/")
        for _ in range(2):  # only now, so that Serve's processes are on the head
            cluster.add_node(num_cpus=WORKER_CPUS)
        with Client(f"127.0.0.1:{grpc_port}") as client:
            result = change_nodes(cluster, client, cases)
        serve.shutdown()
        print(json.dumps({**result, "left": actors_left()}))
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
