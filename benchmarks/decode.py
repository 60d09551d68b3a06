"""Decode speed of the cluster against one-process transformers, in one run on the same cores.

    python -m benchmarks.decode [--json FILE]

Makes a random bf16 Mixtral checkpoint, generates greedily with one-process transformers (all cores;
``grouped_mm`` experts, and ``eager`` ones, which are faster on processors without bf16
instructions), then with a real deployment (gateway, one router, two expert
actors, over gRPC), for 32 streams and for one; prints tokens per second, the time of a layer's
dispatch+combine, and the memory of each process. Ratios are what to keep: absolute figures move
with the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import SIZES, machine, make_checkpoint, show, summary_ms, write_json

PROMPT_TOKENS = 16
HTTP_PORT, GRPC_PORT = 18_700, 19_700
MODEL = "bench"
STREAMS = ("32", "1")
EXPERTS = ("grouped_mm", "eager")


def prompts(streams: int) -> list[list[int]]:
    """Return the streams' prompts, all different."""
    return [
        [1 + (31 * stream + 7 * i) % (SIZES["vocab_size"] - 1) for i in range(PROMPT_TOKENS)]
        for stream in range(streams)
    ]


def measure_transformers(
    folder: Path, experts: str, streams: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Run in a process of its own (see ``--baseline``): median tokens per second, and memory."""
    import psutil
    import torch
    from transformers import MixtralForCausalLM

    torch.set_num_threads(psutil.cpu_count() or 1)
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=experts
    ).eval()
    ids = torch.tensor(prompts(streams))

    def once(count: int) -> float:
        started_s = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
        )
        return streams * count / (time.perf_counter() - started_s)

    once(2)
    rates = [once(tokens) for _ in range(rounds)]
    return {
        "tokens_per_s": statistics.median(rates),
        "rss_mb": psutil.Process().memory_info().rss / 1e6,
    }


def baseline(folder: Path, experts: str, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure transformers in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.decode", "--baseline", str(folder)]
    command += ["--experts", experts]
    sizes = ["--streams", str(streams), "--tokens", str(tokens), "--rounds", str(rounds)]
    done = subprocess.run(command + sizes, check=True, capture_output=True, text=True, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def start_cluster(folder: Path, actors: int) -> None:
    """Start Ray, Serve and the application on ports of the benchmark's own."""
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    from router.app import build

    ray.init(address="local", include_dashboard=False, logging_level="warning")
    serve.start(
        http_options={"port": HTTP_PORT},
        grpc_options=gRPCOptions(
            port=GRPC_PORT,
            grpc_servicer_functions=["router.gateway.grpc_service:add_services_to_server"],
        ),
    )
    args = {
        "models": [{"id": MODEL, "path": str(folder)}],
        "experts": {"actors": actors},
        "router": {"cache_tokens": 8192},
    }
    serve.run(build(args), name=MODEL, route_prefix="/")


def wait_ready(timeout_s: float = 120) -> None:
    """Wait until every expert has a live copy."""
    from router.client import Client

    deadline_s = time.monotonic() + timeout_s
    with Client(f"127.0.0.1:{GRPC_PORT}") as client:
        while client.status().missing_experts:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the experts were not there after {timeout_s} s")
            time.sleep(0.2)


def measure_cluster(streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Generate over gRPC, one call per stream, all at once; median tokens per second."""
    from router.client import Client, Sampling

    with Client(f"127.0.0.1:{GRPC_PORT}") as client, ThreadPoolExecutor(streams) as pool:

        def generate(prompt: list[int]) -> int:
            [reply] = client.generate(
                prompt,
                Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
                timeout_s=300,
            )
            return len(reply.token_ids)

        def once() -> float:
            started_s = time.perf_counter()
            generated = sum(pool.map(generate, prompts(streams)))
            return generated / (time.perf_counter() - started_s)

        once()
        rates = [once() for _ in range(rounds)]
    return {"tokens_per_s": statistics.median(rates)} | router_layers()


def router_layers() -> dict[str, Any]:
    """Return the router's latest layer times."""
    from ray import serve

    handle = serve.get_deployment_handle(f"Router-{MODEL}", app_name=MODEL)
    stats = handle.stats.remote().result(timeout_s=30)
    return {"layer": summary_ms(stats["layer_s"]), "router_rss_mb": stats["rss_bytes"] / 1e6}


def memory() -> dict[str, Any]:
    """Return the resident memory of routers, gateways and actors, and what actors' weights take."""
    import psutil

    from router.client import Client

    with Client(f"127.0.0.1:{GRPC_PORT}") as client:
        status = client.status()
    expert_bytes = 3 * SIZES["hidden_size"] * SIZES["intermediate_size"] * 2
    pids = {
        **{f"router {i}": p.pid for i, p in enumerate(status.routers)},
        **{f"gateway {i}": p.pid for i, p in enumerate(status.gateways)},
        **{actor.actor_id: actor.pid for actor in status.actors},
    }
    weights = {a.actor_id: len(a.experts) * expert_bytes / 1e6 for a in status.actors}
    return {
        name: {
            "rss_mb": psutil.Process(pid).memory_info().rss / 1e6,
            "expert_weights_mb": weights.get(name, 0.0),
        }
        for name, pid in pids.items()
    }


def run(tokens: int, rounds: int, actors: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder)
        result: dict[str, Any] = {"benchmark": "decode", "machine": machine(), "sizes": SIZES}
        result["transformers"] = {
            experts: {n: baseline(folder, experts, int(n), tokens, rounds) for n in STREAMS}
            for experts in EXPERTS
        }
        start_cluster(folder, actors)
        try:
            wait_ready()
            result["cluster"] = {n: measure_cluster(int(n), tokens, rounds) for n in STREAMS}
            result["memory"] = memory()
        finally:
            serve.shutdown()
            ray.shutdown()
    result["ratio"] = {
        experts: {
            n: result["cluster"][n]["tokens_per_s"]
            / result["transformers"][experts][n]["tokens_per_s"]
            for n in STREAMS
        }
        for experts in EXPERTS
    }
    return result


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        (
            f"{n} streams, {experts}",
            f"{result['transformers'][experts][n]['tokens_per_s']:.0f}",
            f"{result['cluster'][n]['tokens_per_s']:.0f}",
            f"{result['ratio'][experts][n]:.2f}",
            f"{result['cluster'][n]['layer']['p50_ms']:.2f}",
            f"{result['cluster'][n]['layer']['p99_ms']:.2f}",
        )
        for n in STREAMS
        for experts in EXPERTS
    ]
    columns = ["", "transformers tok/s", "cluster tok/s", "ratio", "layer p50 ms", "p99 ms"]
    show("decode", rows, columns)
    memory_rows = [
        (name, f"{m['rss_mb']:.0f}", f"{m['expert_weights_mb']:.0f}")
        for name, m in result["memory"].items()
    ]
    show("memory", memory_rows, ["process", "resident MB", "expert weights MB"])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--baseline", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--experts", default="eager", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=32, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.baseline:
        streams, tokens, rounds = options.streams, options.tokens, options.rounds
        measured = measure_transformers(options.baseline, options.experts, streams, tokens, rounds)
        print(json.dumps(measured))
        return
    result = run(options.tokens, options.rounds, options.actors)
    report(result)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
