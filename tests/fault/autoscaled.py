"""A pool of one actor to a node, on a Ray whose autoscaler brings and takes nodes; prints JSON.

A program of its own, since its Ray cannot live in one process with the tests':
``python -m tests.fault.autoscaled FOLDER``. The nodes are Ray's own fakes: processes of this
machine. At first there is none that has what an actor needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.reports import ClusterStatus
from router.app import build
from router.client import Client, Sampling
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import prompt_of, transformers_tokens, wait_until
from tests.fault.node_loss import is_whole, wait_status

RAY = Path(sysconfig.get_path("scripts")) / "ray"
MODEL, LENGTH, APP = "random", 16, "expertmesh"
DEVICE, MOST = "device", 2
HEAD_CPUS, START_S, GONE_S = 4, 60.0, 90.0
GREEDY = Sampling(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
HEAD = "ray.head.default"
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
"""What nodes would run; each must be there, if only empty."""


def autoscaling(address: str) -> dict[str, Any]:
    """Return the configuration of the autoscaler: nodes with one device, that go when idle."""
    return {
        "cluster_name": "fake",
        "max_workers": MOST,
        "idle_timeout_minutes": 0.1,
        # By its class: the defaults of its own name are in a file that Ray's wheels lack.
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": HEAD_CPUS}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, DEVICE: 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST,
            },
        },
        "head_node_type": HEAD,
        **{name: [] for name in COMMANDS},
        "cluster_synced_files": [],
        "file_mounts": {},
    }


@contextmanager
def head(work: Path) -> Iterator[str]:
    """Run a Ray with an autoscaler; yields its address. Ends what it started, and nothing else."""
    port, *others = free_ports(5)
    address = f"127.0.0.1:{port}"
    config = work / "autoscaling.json"
    config.write_text(json.dumps(autoscaling(address)))
    options = ("port", "ray-client-server-port", "dashboard-agent-listen-port")
    given = [f"--{name}={number}" for name, number in zip(options, (port, *others), strict=False)]
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", *given]
    command += [f"--autoscaling-config={config}", f"--num-cpus={HEAD_CPUS}"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with (work / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
    started = psutil.Process(process.pid)
    try:
        wait_until(lambda: _takes_drivers(address), "Ray is there", START_S)
        yield address
    finally:
        ray.shutdown()
        for one in (*started.children(recursive=True), started):
            one.kill()
        process.wait(START_S)


def _takes_drivers(address: str) -> bool:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except ConnectionError:
        return False
    return True


def workers() -> int:
    """Return how many nodes with a device Ray has."""
    return sum(node["Alive"] and DEVICE in node["Resources"] for node in ray.nodes())


def main(work: Path) -> int:
    """Run; returns the exit status."""
    oracle = save_mixtral(work / MODEL)
    prompt = prompt_of(6, 1)
    expected = transformers_tokens(oracle, prompt, LENGTH)
    pool = {"name": "expert", "actors": 1, "num_cpus": 1, "resources": {DEVICE: 1}}
    bounds = {"min_actors": 1, "max_actors": MOST, "dry_run": True}  # the test asks itself
    args = {
        "models": [{"id": MODEL, "path": str(work / MODEL)}],
        "experts": {"pools": [{**pool, "autoscaling": bounds}]},
    }
    http_port, grpc_port = free_ports(2)
    steps: list[dict[str, Any]] = []
    with head(work), Client(f"127.0.0.1:{grpc_port}") as client:

        def note(step: str, condition: Callable[[ClusterStatus], bool]) -> None:
            told = wait_status(client, condition)
            answer = client.generate(prompt, GREEDY, model=MODEL)
            steps.append(
                {
                    "step": step,
                    "workers": workers(),
                    "actor_nodes": sorted(actor.node for actor in told.actors),
                    "is_right": tuple(answer[0].token_ids) == expected,
                }
            )

        before = workers()
        serve.start(**serve_options())
        serve.run(build(with_ports(args, http_port, grpc_port)), name=APP, route_prefix="/")
        note("start", is_whole)
        more = client.scale(2)
        note("more", lambda told: is_whole(told) and len(told.actors) == 2)
        fewer = client.scale(1)
        wait_until(lambda: workers() == 1, "the node that is left over is gone", GONE_S)
        note("fewer", lambda told: is_whole(told) and len(told.actors) == 1)
        serve.shutdown()
    outcomes = [more.outcome, fewer.outcome]
    print(json.dumps({"before": before, "steps": steps, "outcomes": outcomes}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
