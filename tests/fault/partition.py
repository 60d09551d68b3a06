"""The controller's network to all actors is cut for a while; prints what came of it as JSON.

A program of its own: ``python -m tests.fault.partition``. Three nodes have networks of their own
(:mod:`tests.fault.network`): the controller and the gateway are on the head, the router is on the
second, the actors are on the third. Only the link between the head and the actors is cut.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.errors import ExpertMeshError
from cluster.reports import ClusterStatus
from router.app import build
from router.client import Client, Sampling
from tests.fault.load import Case, Load
from tests.fault.network import Network, enter
from tests.fault.ray_nodes import RayNodes, wait_for

HEAD, ROUTER, EXPERTS = range(3)
PLACE = "place_of_an_expert"
MODEL, ACTORS, LENGTH, STREAMS, UNARY = "mesh-tiny", 3, 40, 3, 1
CUT_S = 8.0
"""Longer than an actor may be silent; Ray declares a node dead after about twice as long."""
SETTLED_S = 5.0
DEADLINE_S = 60.0
PROMPTS = tuple(tuple(range(first, first + 6)) for first in (10, 30, 50, 70))
"""Token ids."""
ARGS = {
    "models": [{"id": MODEL, "path": "models/mesh-tiny"}],
    "experts": {
        "pools": [{"name": "expert", "actors": ACTORS, "num_cpus": 1.0, "resources": {PLACE: 1}}]
    },
    "router": {"num_cpus": 1.0},
    "gateway": {"num_cpus": 0.0},
}


def main() -> int:
    """Run; returns the exit status."""
    network = Network(3)
    http_port, grpc_port = free_ports(2)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "node_ip_address": network.address(HEAD)},
    )
    logs = TemporaryDirectory()
    nodes = RayNodes(network, Path(logs.name), os.environ)
    join = f"--address={cluster.address}"
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        serve.start(**serve_options())
        deployed = threading.Thread(
            target=lambda: serve.run(
                build(with_ports(ARGS, http_port, grpc_port)), route_prefix="/"
            )
        )
        deployed.start()
        # One after the other, so that each part has one node with room for it.
        wait_for(lambda: running("Controller") and running("Gateway"), "controller and gateway run")
        nodes.start(ROUTER, join, "--num-cpus=1")
        wait_for(lambda: running(f"Router-{MODEL}"), "the router runs")
        places = json.dumps({PLACE: ACTORS})
        nodes.start(EXPERTS, join, f"--num-cpus={ACTORS}", f"--resources={places}")
        deployed.join()
        with Client(f"127.0.0.1:{grpc_port}", retry=None) as client:
            print(json.dumps(cut_twice(network, client)))
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.stop()
        cluster.shutdown()
        logs.cleanup()
        network.close()
    return 0


def running(kind: str) -> bool:
    """Return whether a replica of a kind of deployment runs; a gateway's name goes on."""
    return any(
        f"{name}-".startswith(f"{kind}-") and deployment.replica_states.get("RUNNING", 0) > 0
        for application in serve.status().applications.values()
        for name, deployment in application.deployments.items()
    )


def status_of(client: Client) -> ClusterStatus | None:
    """Return the status, or ``None`` where nobody answers."""
    with suppress(ExpertMeshError):
        return client.status()
    return None


def cut_twice(network: Network, client: Client) -> dict[str, object]:
    """Cut the controller off from the actors while nobody asks them, and then under load."""

    def is_whole() -> bool:
        status = status_of(client)
        return status is not None and not status.missing_experts and len(status.actors) == ACTORS

    wait_for(is_whole, "all experts are there")
    cases = []
    for prompt in PROMPTS:
        sampling = Sampling(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
        [reply] = client.generate(prompt, sampling, model=MODEL, timeout_s=DEADLINE_S)
        cases.append(Case(prompt, reply.token_ids))
    before = client.status()
    parts = [[before.controller_pid, before.gateways[0].pid], [before.routers[0].pid]]
    parts.append([actor.pid for actor in before.actors])
    networks = [sorted({os.readlink(f"/proc/{pid}/ns/net") for pid in pids}) for pids in parts]
    print(networks, file=sys.stderr)
    idle_silences = cut(network, client)
    load = Load(client, MODEL, cases, STREAMS, UNARY, DEADLINE_S)
    threading.Event().wait(1.0)
    asked = load.outcome().requests
    busy_silences = cut(network, client)
    answered = load.outcome().requests - asked
    outcome = load.end()
    after = client.status()
    return {
        "networks": networks,
        "before": [[a.actor_id, a.pid, a.generation] for a in before.actors],
        "after": [[a.actor_id, a.pid, a.generation] for a in after.actors],
        "orders": [[s.epoch, s.placement_version] for s in (before, after)],
        "idle_silences": idle_silences,
        "busy_silences": busy_silences,
        "answered": answered,
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
    }


def cut(network: Network, client: Client) -> list[str]:
    """Cut the link for a while; returns what the status says of actors at its end."""
    network.cut(HEAD, EXPERTS)
    threading.Event().wait(CUT_S)
    status = client.status()
    network.heal(HEAD, EXPERTS)
    wait_for(
        lambda: (
            (now := status_of(client)) is not None
            and len(now.actors) == ACTORS
            and not any(actor.silence for actor in now.actors)
        ),
        "all actors are heard again",
    )
    threading.Event().wait(SETTLED_S)  # for a kill that was on its way
    return [actor.silence for actor in status.actors]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        enter("tests.fault.partition", "inside")
    sys.exit(main())
