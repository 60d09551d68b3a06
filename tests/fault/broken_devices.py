"""A Ray of four nodes, whose devices break one after the other; prints what came of it as JSON.

A program of its own, since its Ray cannot live in one process with the tests':
``python -m tests.fault.broken_devices FOLDER MODE``. Serve's processes are on the head; each of
three workers has room for one of two actors. A device is broken while there is a file with the name
of its node: every product raises (``raise``) or yields NaN (``nan``) there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.reports import ClusterStatus
from cluster.spec import ActorSpec
from cluster.wire.frames import Buffer
from experts.remote import RemoteExpertActor
from router.app import application
from router.client import Client
from router.serve.controller import ControllerDeployment
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import prompt_of, transformers_tokens
from tests.fault.load import Case, Load
from tests.fault.node_loss import HEAD_CPUS, NUM_CPUS, is_whole, wait_status

APP, MODEL, LENGTH, STREAMS, UNARY = "expertmesh", "random", 24, 3, 2
DEADLINE_S = 60.0
FOLDER = "EXPERTMESH_TEST_BROKEN"
"""The variable of a process's environment that names the folder of the files."""


class FragileActor(RemoteExpertActor):
    """An actor whose device is broken while there is a file with the name of its node."""

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        """See :class:`RemoteExpertActor`."""
        super().__init__(spec, actor_id, generation, epoch)
        from experts import bank, queue

        queue.IS_BUILT = False  # frames that come alone are computed by the bank as well
        product = bank.compute_native
        file = Path(os.environ[FOLDER]) / ray.get_runtime_context().get_node_id()

        def computed(experts: Sequence[Any], counts: Any, rows: Buffer) -> memoryview | None:
            mode = file.read_text() if file.exists() else ""
            if mode == "raise":
                raise RuntimeError("the device is gone")
            output = product(experts, counts, rows)
            if mode == "nan" and output is not None:
                return np.full(output.nbytes // 4, np.nan, np.float32).view(np.uint8).data
            return output

        bank.compute_native = computed


class FragileController(ControllerDeployment):
    """A controller of such actors."""

    actor_class: ClassVar[type] = FragileActor


def is_served(status: ClusterStatus) -> bool:
    """Tell whether every expert has its copies, and no actor fails."""
    return is_whole(status) and not status.failing


def break_devices(client: Client, folder: Path, mode: str, cases: list[Case]) -> dict[str, Any]:
    """Break the device of the first actor under load, then all; return what came of it."""
    before = wait_status(client, is_whole)
    load = Load(client, MODEL, cases, STREAMS, UNARY, DEADLINE_S)
    broken = before.actors[0]
    (folder / broken.node).write_text(mode)
    began_s = time.monotonic()
    failing = wait_status(client, lambda status: bool(status.failing)).failing
    after = wait_status(
        client, lambda status: is_whole(status) and status.actors[0].generation > broken.generation
    )
    replaced_s = time.monotonic() - began_s
    outcome = load.end()
    # All break: each successor comes up, and fails.
    for node in ray.nodes():
        (folder / node["NodeID"]).write_text(mode)
    load = Load(client, MODEL, cases, STREAMS, UNARY, DEADLINE_S)
    looping = wait_status(client, lambda status: any(f.deaths >= 4 for f in status.failing))
    for file in folder.iterdir():
        file.unlink()
    mended = wait_status(client, is_whole)
    load.end()  # with one copy broken and no other, NaN may end requests
    last = Load(client, MODEL, cases, STREAMS, UNARY, DEADLINE_S)
    wait_status(client, is_served)  # it forgets the deaths, after some work
    last_outcome = last.end()
    return {
        "before": [asdict(actor) for actor in before.actors],
        "after": [asdict(actor) for actor in after.actors],
        "mended": [asdict(actor) for actor in mended.actors],
        "failing": [asdict(actor) for actor in failing],
        "looping": [asdict(actor) for actor in looping.failing],
        "replaced_s": replaced_s,
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
        "last_failures": dict(last_outcome.failures),
    }


def main(work: Path, mode: str) -> int:
    """Run; returns the exit status."""
    oracle = save_mixtral(work / MODEL)
    cases = []
    for seed in range(4):
        prompt = tuple(prompt_of(8, seed))
        cases.append(Case(prompt, transformers_tokens(oracle, prompt, LENGTH)))
    folder = work / "broken"
    folder.mkdir()
    os.environ[FOLDER] = str(folder)
    args = {
        "models": [{"id": MODEL, "path": str(work / MODEL), "dtype": "float32"}],
        "experts": {"actors": 2, "num_cpus": NUM_CPUS, "min_copies": 2},
    }
    http_port, grpc_port = free_ports(2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        serve.start(**serve_options())
        serve.run(
            application(with_ports(args, http_port, grpc_port), FragileController),
            name=APP,
            route_prefix="/",
        )
        for _ in range(3):  # only now, so that Serve's processes are on the head
            cluster.add_node(num_cpus=NUM_CPUS)
        with Client(f"127.0.0.1:{grpc_port}") as client:
            result = break_devices(client, folder, mode, cases)
        serve.shutdown()
        print(json.dumps(result))
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
