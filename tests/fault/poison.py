"""Requests at which routers and expert actors end, beside others; prints what came of them as JSON.

A program of its own, since its Ray cannot live in one process with the tests':
``python -m tests.fault.poison FOLDER``. :mod:`tests.fault.poison_hook` ends the processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.errors import ExpertMeshError
from router.app import build
from router.client import Client
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import greedy, prompt_of, transformers_tokens, wait_until
from tests.fault.poison_hook import DEATHS, ROUTER_POISON, ROWS
from tests.poison import last_rows

APP, MODEL, LENGTH = "expertmesh", "random", 60
ROUTERS, ACTORS = 2, 3
ACTOR_POISON = [17, 3, 17, 19]
TIMEOUT_S, WHOLE_S = 60.0, 90.0


def is_whole(client: Client) -> bool:
    """Return whether all processes are there, and every expert has its copies."""
    told = client.status()
    return (
        len(told.routers) == ROUTERS
        and len(told.actors) == ACTORS
        and told.live_copies >= told.min_copies
    )


def among_others(
    client: Client, poison: list[int], expected: list[tuple[list[int], list[int]]]
) -> dict[str, Any]:
    """Return the poison's error, and the number of other requests that failed or are wrong."""

    def tokens(prompt: list[int]) -> list[int]:
        [reply] = client.generate(prompt, greedy(LENGTH), model=MODEL, timeout_s=TIMEOUT_S)
        return list(reply.token_ids)

    with ThreadPoolExecutor(1 + len(expected)) as pool:
        others = [pool.submit(tokens, prompt) for prompt, _ in expected]
        poisoned = pool.submit(tokens, poison)
        error = poisoned.exception(TIMEOUT_S + 10)
        failed = [other.exception(TIMEOUT_S + 10) for other in others]
        return {
            "code": error.code.value if isinstance(error, ExpertMeshError) else repr(error),
            "error": str(error),
            "failed": [repr(failure) for failure in failed if failure is not None],
            "wrong": sum(
                other.result() != tokens
                for other, (_, tokens) in zip(others, expected, strict=True)
                if other.exception() is None
            ),
        }


def main(work: Path) -> int:
    """Run; returns the exit status."""
    folder = work / MODEL
    oracle = save_mixtral(folder)
    prompts = [prompt_of(8, seed) for seed in range(6)]
    expected = [(p, list(transformers_tokens(oracle, p, LENGTH))) for p in prompts]
    rows, deaths = work / "rows", work / "deaths"
    rows.write_bytes(b"".join(last_rows(folder, ACTOR_POISON)))
    deaths.touch()
    variables = {ROWS: str(rows), DEATHS: str(deaths)}
    variables["PYTHONPATH"] = str(Path(__file__).parents[2])
    args = {
        "models": [{"id": MODEL, "path": str(folder), "dtype": "float32"}],
        "experts": {"actors": ACTORS, "min_copies": 2},
        "router": {"replicas": ROUTERS},
    }
    http_port, grpc_port = free_ports(2)
    os.environ.update(variables)
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        namespace="serve",
        runtime_env={
            "worker_process_setup_hook": "tests.fault.poison_hook.arm",
            "env_vars": variables,
        },
    )
    try:
        serve.start(**serve_options())
        serve.run(build(with_ports(args, http_port, grpc_port)), name=APP, route_prefix="/")
        result: dict[str, Any] = {}
        with Client(f"127.0.0.1:{grpc_port}", retry=None) as client:
            for what, prompt in (("actor", ACTOR_POISON), ("router", ROUTER_POISON)):
                wait_until(lambda: is_whole(client), "the cluster is whole", WHOLE_S)
                result[what] = among_others(client, prompt, expected)
        result["deaths"] = Counter(line.split()[0] for line in deaths.read_text().splitlines())
        serve.shutdown()
        print(json.dumps(result))
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
