"""Gray failures under load: parts that go on living, but wrongly, slowly or alone.

    python -m benchmarks.gray_soak [--minutes 20] [--seed N] [--json FILE]

Serves a random Mixtral on a Ray of five nodes, each with a network of its own: the controller and
the gateway on the head, two routers on two nodes, four expert actors on two others, two copies of
each expert. Streams and unary requests never stop, and every answer is compared with that of
transformers. A seeded bag of faults goes round, each of them as soon as the cluster is whole after
the one before: an actor that raises on every product, one that is five times slower, a request at
which routers end, a request at which actors end, the controller cut off from all actors, a router
cut off from half of them. Every fault is seen to have hit.

Prints what was hit, and what failed. The exit status is 1 when a request other than the poison
failed or was wrong, when a fault did not hit, when the cluster was not whole in time, or when a
process ended that no fault had hit. Needs Linux, ``unshare``, ``nsenter`` and ``ip``; no rights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine, progress, show

if TYPE_CHECKING:
    from tests.fault.gray import Gray
    from tests.fault.network import Network

MODEL, LENGTH, CASES, STREAMS, UNARY = "random", 48, 8, 6, 2
ROUTER_NODES, EXPERT_NODES = (1, 2), (3, 4)
PLACE = "place_of_an_expert"
ACTORS, ROOM = 4, 4
"""Actors, and how many of them one node has room for."""
REQUEST_TIMEOUT_S = 90.0
ACTOR_POISON = [17, 3, 17, 19]
EXPERTS = {
    "pools": [{"name": "expert", "actors": ACTORS, "num_cpus": 0.0, "resources": {PLACE: 1}}],
    "min_copies": 2,
}
ARGS = {
    "experts": EXPERTS,
    "router": {"num_cpus": 1.0, "replicas": len(ROUTER_NODES)},
    "gateway": {"num_cpus": 0.0},
}


def bag(seed: int) -> Iterator[tuple[Gray, int]]:
    """Yield faults, and a number that chooses the victim, for ever: all kinds in some order."""
    from tests.fault.gray import Gray

    source = random.Random(seed)
    while True:
        for fault in source.sample(list(Gray), len(Gray)):
            yield fault, source.randrange(1 << 16)


@contextmanager
def deployed(folder: Path, network: Network, variables: Mapping[str, str]) -> Iterator[Any]:
    """Serve the model until the block ends; yields the ports."""
    import subprocess
    import threading

    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from benchmarks.serve_clients import Ports
    from benchmarks.shipped import free_ports, serve_options, with_ports
    from router.app import application
    from tests.fault.gray import GrayController
    from tests.fault.partition import running, start_node, wait_for

    ports = Ports(*free_ports(2))
    args = {"models": [{"id": MODEL, "path": str(folder), "dtype": "float32"}], **ARGS}
    head = {"num_cpus": 0, "node_ip_address": network.address(0)}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level="warning",
            namespace="serve",
            runtime_env={
                "worker_process_setup_hook": "tests.fault.poison_hook.arm",
                "env_vars": dict(variables),
            },
        )
        serve.start(**serve_options())
        app = application(with_ports(args, ports.http, ports.grpc), GrayController)
        serving = threading.Thread(target=lambda: serve.run(app, route_prefix="/"))
        serving.start()
        # One after the other, so that each part has one kind of node with room for it.
        wait_for(lambda: running("Controller") and running("Gateway"), "controller and gateway run")
        for node in ROUTER_NODES:
            nodes.append(start_node(network, cluster.address, node, 1, {}))
        wait_for(lambda: running(f"Router-{MODEL}"), "a router runs")
        for node in EXPERT_NODES:
            nodes.append(start_node(network, cluster.address, node, 0, {PLACE: ROOM}))
        serving.join()
        yield ports
    finally:
        serve.shutdown()
        ray.shutdown()
        for one in nodes:
            one.terminate()
            one.wait()
        cluster.shutdown()


def run(minutes: float, seed: int) -> dict[str, Any]:
    """Run the whole soak; returns what ``--json`` writes."""
    import torch

    from router.client import Client
    from tests.checkpoints import save_mixtral
    from tests.cluster_fixture import prompt_of, transformers_tokens
    from tests.fault.gray import FOLDER, GrayFaults, Poison, Watch, settled
    from tests.fault.load import Case, Load
    from tests.fault.network import Network
    from tests.fault.poison_hook import DEATHS, ROUTER_POISON, ROWS
    from tests.poison import last_rows

    hits: list[tuple[float, str, str]] = []
    missed: list[str] = []
    network = Network(1 + len(ROUTER_NODES) + len(EXPERT_NODES))
    with tempfile.TemporaryDirectory() as name, progress("gray soak", None) as begin:
        work = Path(name)
        torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
        oracle = save_mixtral(work / MODEL)
        cases = []
        for place in range(CASES):
            prompt = tuple(prompt_of(6 + 3 * place, place))
            cases.append(Case(prompt, tuple(transformers_tokens(oracle, prompt, LENGTH))))
        rows, deaths = work / "rows", work / "deaths"
        rows.write_bytes(b"".join(last_rows(work / MODEL, ACTOR_POISON)))
        deaths.touch()
        variables = {ROWS: str(rows), DEATHS: str(deaths), FOLDER: str(work)}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        os.environ.update(variables)
        begin("deployment")
        with (
            deployed(work / MODEL, network, variables) as ports,
            Client(ports.grpc_address) as client,
            Client(ports.grpc_address, retry=None) as faults_client,
        ):
            settled(faults_client)
            watch = Watch(faults_client)
            metrics_url = f"http://127.0.0.1:{ports.http}/metrics"
            poison = Poison(MODEL, ROUTER_POISON, ACTOR_POISON, deaths)
            nodes = (ROUTER_NODES, EXPERT_NODES)
            faults = GrayFaults(faults_client, metrics_url, network, nodes, watch, poison)
            load = Load(client, MODEL, cases, STREAMS, UNARY, REQUEST_TIMEOUT_S)
            started_s = time.monotonic()
            try:
                for fault, choice in bag(seed):
                    if time.monotonic() - started_s > 60 * minutes:
                        break
                    at_s = time.monotonic() - started_s
                    begin(f"{fault.value}, {load.outcome().failures.total()} failed")
                    try:
                        hits.append((at_s, fault.value, faults.inject(fault, choice)))
                    except (AssertionError, TimeoutError) as error:
                        missed.append(f"{fault.value}, at {at_s:.0f} s: {error}")
            finally:
                outcome = load.end()
            took_s = time.monotonic() - started_s
            ended = watch.end(faults.dead_by_poison())
    network.close()
    return {
        "benchmark": "gray_soak",
        "machine": machine(),
        "minutes": minutes,
        "seed": seed,
        "faults": dict(Counter(kind for _, kind, _ in hits)),
        "hits": hits,
        "missed": missed,
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
        "healthy_ended": ended,
        "tokens_per_s": outcome.tokens / took_s,
    }


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    show(
        f"gray soak, {result['minutes']:g} minutes, seed {result['seed']}: faults",
        [(f"{at_s:.0f}", kind, word) for at_s, kind, word in result["hits"]],
        ["at, s", "fault", "hit"],
    )
    figures = [
        *((kind, str(count)) for kind, count in result["faults"].items()),
        ("requests", str(result["requests"])),
        *((f"failed: {reason}", str(count)) for reason, count in result["failures"].items()),
        ("faults that did not hit", str(len(result["missed"]))),
        ("healthy processes that ended", str(len(result["healthy_ended"]))),
        ("tokens/s", f"{result['tokens_per_s']:.0f}"),
    ]
    show("gray soak, counts", figures, ["", "count"])
    for fault in result["missed"]:
        print(f"did not hit: {fault}")
    for process in result["healthy_ended"]:
        print(f"ended, though no fault hit it: {process}")


def main() -> int:
    """Parse the command line and run in namespaces of its own; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="the same seed has the same faults")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        from tests.fault.network import enter

        # Ray's proxy starts beside five nodes on few cores.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        enter("benchmarks.gray_soak", *sys.argv[1:], "--inside")
    result = run(options.minutes, options.seed)
    report(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(any(result[name] for name in ("failures", "healthy_ended", "missed")))


if __name__ == "__main__":
    sys.exit(main())
