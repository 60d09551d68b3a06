"""A Ray of four nodes on this machine loses one under load; prints what came of it as JSON.

A program of its own, since its Ray cannot live in one process with the tests':
``python -m tests.fault.node_loss FOLDER COPIES``. Serve's processes are on the head, the experts on
two workers, and the checkpoint on the fourth node only, from which all others fetch what they need.
With one copy of each expert a reader of the checkpoint is lost, too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util import list_named_actors
from transformers import MixtralForCausalLM

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.errors import ExpertMeshError
from cluster.reports import ActorStatus, ClusterStatus
from cluster.spec import ACTOR_NAMESPACE, actor_name
from router.app import build
from router.client import Client
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import is_alive, prompt_of, transformers_tokens
from tests.fault.hub_cache import HUB_ID, cache_environment, make_cache
from tests.fault.load import Case, Load, Wait

MODEL, LENGTH, STREAMS, UNARY = "random", 24, 3, 2
DEADLINE_S, LIMIT_S, GONE_S, POLL_S = 30.0, 120.0, 20.0, 0.1
HEAD_CPUS, WORKER_CPUS = 1, 4
FAST, EXPERT_BYTES = "fast", 3 * 64 * 96 * 4
APP, READER = "expertmesh", "ray::CheckpointReader"
MODELS = [{"id": MODEL, "path": HUB_ID}]
# More than Serve leaves of the head: there is no room for an expert beside Serve's processes.
NUM_CPUS = 1.0
# A resource of our own stands for GPUs; budgets leave room for a single expert more.
POOLS = [
    {"name": "fast", "actors": 2, "num_cpus": NUM_CPUS, "resources": {FAST: 1}}
    | {"memory_budget_bytes": 10 * EXPERT_BYTES},
    {"name": "slow", "actors": 1, "num_cpus": NUM_CPUS, "memory_budget_bytes": 5 * EXPERT_BYTES},
]
EXPERTS = {
    1: {"pools": POOLS},
    2: {"actors": 2, "num_cpus": NUM_CPUS, "min_copies": 2},
}
"""What serves, by how many copies there are."""


def wait_status(client: Client, condition: Callable[[ClusterStatus], bool]) -> ClusterStatus:
    """Return the first status that satisfies ``condition``; raises ``TimeoutError``."""
    pause, deadline_s = threading.Event(), time.monotonic() + LIMIT_S
    told: ClusterStatus | None = None
    while time.monotonic() < deadline_s:
        with suppress(ExpertMeshError):
            told = client.status()
            if condition(told):
                return told
        pause.wait(POLL_S)
    raise TimeoutError(f"the cluster did not become as it should in {LIMIT_S} s: {told}")


def is_whole(told: ClusterStatus) -> bool:
    """Tell whether every expert has a living copy."""
    return told.missing_experts == 0 and told.live_copies >= told.min_copies


def readers() -> list[psutil.Process]:
    """Return this program's processes that read the checkpoint for another node."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith(READER):
                found.append(process)
    return found


def fetched(told: ClusterStatus) -> dict[str, int]:
    """Return how many bytes of each actor's weights came from another node."""
    return {
        actor.actor_id: ray.get(
            ray.get_actor(
                actor_name(APP, actor.actor_id, actor.generation), ACTOR_NAMESPACE
            ).describe.remote(),
            timeout=DEADLINE_S,
        ).fetched_bytes
        for actor in told.actors
    }


def nodes_without(lost: str) -> list[str]:
    """Return the nodes that Ray says are alive, once it knows of the lost one, as it does later."""
    pause, deadline_s = threading.Event(), time.monotonic() + LIMIT_S
    while True:
        alive = [entry["NodeID"] for entry in ray.nodes() if entry["Alive"]]
        if lost not in alive or time.monotonic() > deadline_s:
            return alive
        pause.wait(POLL_S)


def lose_a_reader(client: Client, victim: ActorStatus) -> dict[str, object]:
    """End an actor, and then what its successor fetches from; return what came of it."""
    pause, deadline_s = threading.Event(), time.monotonic() + LIMIT_S
    psutil.Process(victim.pid).kill()
    while not (found := readers()) and time.monotonic() < deadline_s:
        pause.wait(POLL_S / 10)
    found[0].kill()
    after = wait_status(
        client, lambda told: is_whole(told) and victim.pid not in {a.pid for a in told.actors}
    )
    while (left := readers()) and time.monotonic() < deadline_s:
        pause.wait(POLL_S)
    return {
        "reader": found[0].pid,
        "is_reader_alive": is_alive(found[0].pid),
        "readers_left": len(left),
        "victim": victim.actor_id,
        "fetched_again": fetched(after),
    }


def lose_a_node(cluster: Cluster, client: Client, oracle: MixtralForCausalLM) -> dict[str, object]:
    """Remove the node of the first actor under load; return what came of it."""
    before = wait_status(client, is_whole)
    cases = []
    for seed in range(4):
        prompt = tuple(prompt_of(8, seed))
        cases.append(Case(prompt, transformers_tokens(oracle, prompt, LENGTH)))
    fetched_before = fetched(before)
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
        "alive": nodes_without(lost),
        "before": [asdict(actor) for actor in before.actors],
        "after": [asdict(actor) for actor in after.actors],
        "fetched_before": fetched_before,
        "fetched_after": fetched(after),
        "expert_bytes": EXPERT_BYTES,
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


def main(work: Path, copies: int) -> int:
    """Run; returns the exit status."""
    args = {"models": MODELS, "experts": EXPERTS[copies]}
    oracle = save_mixtral(make_cache(work / "full"))
    full, empty = cache_environment(work / "full"), cache_environment(work / "empty")
    os.environ |= empty  # the builder's too
    http_port, grpc_port = free_ports(2)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS, "env_vars": empty}
    )
    try:
        cluster.add_node(num_cpus=0, env_vars=full)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        serve.start(**serve_options())
        serve.run(build(with_ports(args, http_port, grpc_port)), name=APP, route_prefix="/")
        for _ in range(2):  # only now, so that Serve's processes are on the head
            cluster.add_node(num_cpus=WORKER_CPUS, resources={FAST: 2}, env_vars=empty)
        with Client(f"127.0.0.1:{grpc_port}") as client:
            result = lose_a_node(cluster, client, oracle)
            if copies == 1:
                result |= lose_a_reader(client, client.status().actors[-1])
        serve.shutdown()
        written = [str(file) for file in (work / "empty").rglob("*") if file.is_file()]
        print(json.dumps({**result, "left": actors_left(), "written": written}))
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
