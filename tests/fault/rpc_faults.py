"""Ray itself loses calls, answers and both, while streams are under way; prints what came of it.

A program of its own, since Ray reads ``RAY_testing_rpc_failure`` when it starts:
``python -m tests.fault.rpc_faults FOLDER``, with a folder for its checkpoint. Everything goes by
Ray's calls: from the proxy to the gateway, from there to the router, and to the experts.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private import worker

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.errors import ExpertMeshError
from router.app import build
from router.client import Client
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import prompt_of, transformers_tokens
from tests.fault.load import Case, Load
from tests.fault.node_loss import wait_status

METHOD = "CoreWorkerService.grpc_client.PushTask"
MODES = {
    "req_failure_prob": "request failure",
    "resp_failure_prob": "response failure",
    "in_flight_failure_prob": "response failure while request in flight",
}
"""Ray's name of each mode, and what it says in its log whenever it makes a call fail so."""
PERCENT, MAX_FAILURES = 1, 1000
MODEL, ACTORS, LENGTH, STREAMS, UNARY = "random", 2, 10, 3, 5
DEADLINE_S, LIMIT_S, ASK_S, POLL_S = 60.0, 100.0, 5.0, 0.2
REQUESTS = 20
"""So many requests must have ended, at least."""


def environment() -> dict[str, str]:
    """Return the variables that have every kind of failure hit one call in a hundred."""
    faults = {"num_failures": MAX_FAILURES, **dict.fromkeys(MODES, PERCENT)}
    return {"RAY_testing_rpc_failure": json.dumps({METHOD: faults})}


def injected() -> dict[int, Counter[str]]:
    """Return what Ray's logs say: how many of a process's calls it made fail, by pid and mode."""
    said = re.compile(rf"Inject RPC (.+) for {re.escape(METHOD)}")
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for log in Path(worker._global_node.get_logs_dir_path()).glob("python-core-worker-*.log"):
        pid = int(log.stem.rpartition("_")[2])
        counts[pid].update(said.findall(log.read_text(errors="replace")))
    return counts


def router_retries() -> dict[str, int]:
    """Return how often the router dispatched again, by reason; asks until it is told."""
    handle = serve.get_deployment_handle(f"Router-{MODEL}", "expertmesh")
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        with suppress(Exception):  # this call too may be made to fail
            retries: dict[str, int] = handle.stats.remote().result(timeout_s=ASK_S)["retries"]
            return retries
    raise TimeoutError("the router does not answer")


def lose_calls(client: Client, cases: list[Case]) -> dict[str, Any]:
    """Load the cluster until every mode has hit, and return what came of it.

    Routers and gateways may change meanwhile: one whose health check is lost is replaced by Serve.
    """
    routers, gateways = set[int](), set[int]()
    wait_status(client, lambda status: not status.missing_experts)
    load = Load(client, MODEL, cases, STREAMS, UNARY, DEADLINE_S)
    pause, deadline_s = threading.Event(), time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        with suppress(ExpertMeshError):  # this call too may be made to fail
            told = client.status()
            routers |= {router.pid for router in told.routers}
            gateways |= {gateway.pid for gateway in told.gateways}
        hits = injected()
        of_routers, of_gateways = _of(hits, routers), _of(hits, gateways)
        is_hit = all(of_routers[mode] for mode in MODES.values()) and of_gateways
        if is_hit and load.outcome().requests >= REQUESTS:
            break
        pause.wait(POLL_S)
    took_s = LIMIT_S - (deadline_s - time.monotonic())
    outcome = load.end()
    hits = injected()
    return {
        "took_s": took_s,
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
        "router": _of(hits, routers),
        "gateway": _of(hits, gateways),
        "others": _of(hits, hits.keys() - routers - gateways),
        "retries": router_retries(),
    }


def _of(hits: Mapping[int, Counter[str]], pids: Collection[int]) -> Counter[str]:
    return sum((hits[pid] for pid in pids if pid in hits), Counter())


def main(folder: Path) -> int:
    """Run; returns the exit status."""
    oracle = save_mixtral(folder)
    prompts = [prompt_of(8, seed) for seed in range(4)]
    cases = [Case(tuple(p), transformers_tokens(oracle, p, LENGTH)) for p in prompts]
    http_port, grpc_port = free_ports(2)
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    try:
        serve.start(**serve_options())
        args = {
            "models": [{"id": MODEL, "path": str(folder)}],
            "experts": {"actors": ACTORS, "transport": "ray"},
        }
        serve.run(
            build(with_ports(args, http_port, grpc_port)), name="expertmesh", route_prefix="/"
        )
        with Client(f"127.0.0.1:{grpc_port}") as client:
            print(json.dumps(lose_calls(client, cases)))
        serve.shutdown()
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
