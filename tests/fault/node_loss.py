"""A three-node Ray on this machine loses a worker node under load; prints what came of it as JSON.

A program of its own, since its Ray cannot live in one process with the tests':
``python -m tests.fault.node_loss``. Serve's processes are on the head, the experts on two workers.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from benchmarks.shipped import free_ports, serve_options
from cluster.errors import ExpertMeshError
from cluster.status import ClusterStatus
from router.app import build
from router.client import Client, Sampling
from tests.cluster_fixture import prompt_of
from tests.fault.load import Case, Load, Wait

MODEL, ACTORS, LENGTH, STREAMS, UNARY = "mesh-tiny", 3, 24, 3, 2
DEADLINE_S, LIMIT_S, GONE_S, POLL_S = 30.0, 120.0, 20.0, 0.1
HEAD_CPUS, WORKER_CPUS = 1, 4
ARGS = {
    "models": [{"id": MODEL, "path": f"models/{MODEL}"}],
    # More than Serve leaves of the head: there is no room for an expert beside Serve's processes.
    "experts": {"actors": ACTORS, "num_cpus": 1.0},
}


def wait_status(client: Client, condition: Callable[[ClusterStatus], bool]) -> ClusterStatus:
    """Return the first status that satisfies ``condition``; raises ``TimeoutError``."""
    pause, deadline_s = threading.Event(), time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        with suppress(ExpertMeshError):
            told = client.status()
            if condition(told):
                return told
        pause.wait(POLL_S)
    raise TimeoutError(f"the cluster did not become as it should in {LIMIT_S} s")


def is_whole(told: ClusterStatus) -> bool:
    """Tell whether every expert has a living copy."""
    return told.missing_experts == 0 and len(told.actors) == ACTORS


def lose_a_node(cluster: Cluster, client: Client) -> dict[str, object]:
    """Remove the node of the first actor under load; return what came of it."""
    before = wait_status(client, is_whole)
    cases = []
    for seed in range(4):
        prompt = tuple(prompt_of(8, seed))
        sampling = Sampling(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
        [reply] = client.generate(prompt, sampling, timeout_s=DEADLINE_S)
        cases.append(Case(prompt, reply.token_ids))
    lost = before.actors[0].node
    [node] = [node for node in cluster.worker_nodes if node.node_id == lost]
    waits: list[Wait] = []
    load = Load(client, MODEL, cases, STREAMS, UNARY, DEADLINE_S, waits.append)
    started_s = time.monotonic()
    cluster.remove_node(node, allow_graceful=False)
    after = wait_status(client, lambda t: is_whole(t) and lost not in {a.node for a in t.actors})
    back_s = time.monotonic() - started_s
    outcome = load.end()
    return {
        "lost": lost,
        "alive": [entry["NodeID"] for entry in ray.nodes() if entry["Alive"]],
        "before": [asdict(actor) for actor in before.actors],
        "after": [asdict(actor) for actor in after.actors],
        "back_s": back_s,
        "longest_wait_s": max(wait.took_s for wait in waits),
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
    }


def actors_left() -> list[str]:
    """Return the names of the expert actors that still live after :data:`GONE_S`."""
    pause, deadline_s = threading.Event(), time.monotonic() + GONE_S
    while True:
        names = [entry["name"] for entry in list_named_actors(all_namespaces=True)]
        left = [name for name in names if name.startswith("expertmesh:")]
        if not left or time.monotonic() > deadline_s:
            return left
        pause.wait(POLL_S)


def main() -> int:
    """Run; returns the exit status."""
    http_port, grpc_port = free_ports(2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        serve.start(**serve_options(http_port, grpc_port) | {"proxy_location": "HeadOnly"})
        serve.run(build(ARGS), name="expertmesh", route_prefix="/")
        for _ in range(2):  # only now, so that Serve's processes are on the head
            cluster.add_node(num_cpus=WORKER_CPUS)
        with Client(f"127.0.0.1:{grpc_port}") as client:
            result = lose_a_node(cluster, client)
        serve.shutdown()
        print(json.dumps({**result, "left": actors_left()}))
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
