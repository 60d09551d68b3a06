"""A Ray of nodes with and without the native code; prints what is said of their kernels as JSON.

A program of its own, since its Ray cannot live in one process with the tests':
``python -m tests.fault.mixed_kernels FOLDER``. On one node the native code is missing, as after an
installation without a C compiler. Serve's processes are on the head, the experts on the two nodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
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
from tests.cluster_fixture import greedy, prompt_of, transformers_tokens, wait_until
from tests.fault.node_loss import APP, HEAD_CPUS, LIMIT_S, NUM_CPUS, is_whole, wait_status

MODEL, LENGTH = "random", 24
COMMAND = str(Path(sysconfig.get_path("scripts")) / "expertmesh")
HIDING = 'import sys; sys.modules["expertmesh_native"] = None\n'
"""Python runs it at the start of every process whose ``PYTHONPATH`` has it as sitecustomize."""
BUDGET = 10**6
POOLS = [
    {"name": "native", "actors": 2, "num_cpus": NUM_CPUS, "resources": {"native": 1}}
    | {"memory_budget_bytes": BUDGET},
    {"name": "plain", "actors": 1, "num_cpus": NUM_CPUS, "resources": {"plain": 1}}
    | {"memory_budget_bytes": BUDGET},
]


def logged(words: str) -> list[str]:
    """Return the lines with ``words`` in the logs of this Ray's processes."""
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    texts = (path.read_text(errors="replace") for path in logs.glob("*.err"))
    return [line for text in texts for line in text.splitlines() if words in line]


def shown(address: str, *words: str) -> str:
    """Return what ``expertmesh status`` prints."""
    command = [COMMAND, "status", "--address", address, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def is_served(told: ClusterStatus) -> bool:
    """Tell whether all actors serve, and the router's class is known."""
    return is_whole(told) and len(told.actors) == 3 and any(r.kernels for r in told.routers)


def look(address: str, expected: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Return what the status and the logs say, and how many answers have a wrong token."""
    with Client(address) as client:
        told = wait_status(client, is_served)
        wrong = 0
        for prompt, tokens in expected:
            [reply] = client.generate(prompt, greedy(LENGTH), model=MODEL)
            wrong += list(reply.token_ids) != tokens
    wait_until(lambda: logged("are mixed"), "the log says that kernels are mixed", LIMIT_S)
    return {
        "classes": {a.actor_id: [k.kernel_class for k in a.kernels] for a in told.actors},
        "routers": [k.kernel_class for router in told.routers for k in router.kernels],
        "json": json.loads(shown(address, "--json"))["kernels"],
        "text": shown(address),
        "mixed": logged("are mixed"),
        "by_torch": logged("are computed by torch"),
        "wrong": wrong,
    }


def main(work: Path) -> int:
    """Run; returns the exit status."""
    oracle = save_mixtral(work / MODEL)
    prompts = [prompt_of(8, seed) for seed in range(3)]
    expected = [(p, list(transformers_tokens(oracle, p, LENGTH))) for p in prompts]
    hidden = work / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDING)
    args = {
        "models": [{"id": MODEL, "path": str(work / MODEL), "dtype": "float32"}],
        "experts": {"pools": POOLS},
    }
    http_port, grpc_port = free_ports(2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        serve.start(**serve_options())
        serve.run(build(with_ports(args, http_port, grpc_port)), name=APP, route_prefix="/")
        # Only now, so that Serve's processes are on the head.
        cluster.add_node(num_cpus=4, resources={"native": 2})
        variables = {"PYTHONPATH": str(hidden)}
        cluster.add_node(num_cpus=4, resources={"plain": 1}, env_vars=variables)
        result = look(f"127.0.0.1:{grpc_port}", expected)
        serve.shutdown()
        print(json.dumps(result))
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
