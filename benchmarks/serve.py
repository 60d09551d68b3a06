"""The whole deployment under load, over gRPC and HTTP, against one-process transformers.

    python -m benchmarks.serve [--avx2] [--json FILE]

Serves a random bf16 Mixtral to 32 clients at once; ``benchmarks/README.md`` describes the tables.
The ways are measured there and back, and the engine alone before and after them, so that a machine
whose speed drifts favours neither.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import avx2, baseline, engine
from benchmarks.common import (
    CACHE_TOKENS,
    MODEL,
    PROMPT_TOKENS,
    SIZES,
    cache_mb,
    command,
    dense_mb,
    expert_mb,
    make_checkpoint,
    memory_of,
    progress,
    show,
    show_memory,
    summary_ms,
    write_json,
)
from benchmarks.processor_time import per_token
from benchmarks.serve_clients import WAYS, Ports, Timed
from benchmarks.shipped import free_ports, serve_options, with_ports
from router.security.token_file import make_token

TRANSFORMERS = f"transformers, {baseline.FORMAT}"
FILLING_WAY, FILLING_REQUESTS = "gRPC unary", 32
"""How the cache is filled: by as many requests as a router decodes together."""
LATENCIES = ("first_token", "between_tokens", "request")
CLIENTS, ENGINE = "clients", "router's engine and actors alone"


@contextmanager
def deployed(folder: Path, actors: int, routers: int = 1, min_copies: int = 1) -> Iterator[Ports]:
    """Run the application on a Ray and ports of the benchmark's own, until the block ends.

    ``benchmarks.pair_side`` calls this of other commits too: name and first arguments stay.
    """
    from router.app import build

    args = {
        "models": [{"id": MODEL, "path": str(folder)}],
        "experts": {"actors": actors, "min_copies": min_copies},
        "router": {"cache_tokens": CACHE_TOKENS, "replicas": routers},
    }
    with served(build, args) as ports:
        yield ports


@contextmanager
def served(
    build: Callable[[dict[str, Any]], Any],
    args: Mapping[str, Any],
    num_gpus: int | None = None,
    ports: Ports | None = None,
) -> Iterator[Ports]:
    """Run the application that ``build`` makes of ``args``, as :func:`deployed` does.

    Ray has ``num_gpus`` GPUs, by default those that it finds. The ``ports`` are free ones by
    default.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ports = ports or Ports(*free_ports(2))
    make_token(os.environ)
    ray.init(
        address="local",
        num_gpus=num_gpus,
        include_dashboard=False,
        logging_level="warning",
        log_to_driver=False,
    )
    try:
        serve.start(**serve_options())
        serve.run(build(with_ports(args, ports.http, ports.grpc)), name=MODEL, route_prefix="/")
        wait_ready(ports)
        yield ports
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_ready(ports: Ports, timeout_s: float = 120) -> None:
    """Wait until every expert has a live copy."""
    from router.client import Client

    deadline_s = time.monotonic() + timeout_s
    with Client(ports.grpc_address) as client:
        while client.status().missing_experts:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the experts were not there after {timeout_s} s")
            time.sleep(0.2)


Turn = tuple[list[list[Timed]], dict[str, float]]
"""Rounds of one way, and the microseconds that a token took of each process in them."""


def measure(ports: Ports, way: str, clients: int, tokens: int, rounds: int) -> Turn:
    """Load the deployment one way; a first round, which makes the connections, does not count.

    Raises ``RuntimeError`` when an answer has not as many tokens as it was asked for.
    """
    opened, stream = WAYS[way]
    with opened(ports, clients, tokens, stream) as once:
        once()
        with per_token(clients * tokens * rounds, CLIENTS) as processor_us:
            timed_rounds = [once() for _ in range(rounds)]
    if any(timed.tokens != tokens for some in timed_rounds for timed in some):
        raise RuntimeError(f"{way}: an answer has not {tokens} tokens")
    return timed_rounds, processor_us


def mean(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over turns; a figure that a turn lacks is 0 there."""
    names = dict.fromkeys(name for turn in turns for name in turn)
    return {name: statistics.mean(turn.get(name, 0.0) for turn in turns) for name in names}


def summarize(rounds: Sequence[Sequence[Timed]], stream: bool) -> dict[str, Any]:
    """Return median tokens per second of the rounds, and latencies over all their requests.

    The time to the first token and between tokens only of a ``stream``. Where several tokens come
    as one piece, the time since the last piece counts once.
    """
    rates = [
        sum(timed.tokens for timed in some)
        / (max(t.ended_s for t in some) - min(t.started_s for t in some))
        for some in rounds
    ]
    requests = [timed for some in rounds for timed in some]
    result: dict[str, Any] = {
        "tokens_per_s": statistics.median(rates),
        "request": summary_ms([t.ended_s - t.started_s for t in requests]),
    }
    if stream:
        result["first_token"] = summary_ms([t.pieces[0][0] - t.started_s for t in requests])
        gaps_s = [
            later - sooner
            for timed in requests
            for (sooner, _), (later, _) in zip(timed.pieces, timed.pieces[1:], strict=False)
        ]
        if gaps_s:
            result["between_tokens"] = summary_ms(gaps_s)
    return result


def fill_cache(ports: Ports) -> None:
    """Have requests at once use all pages of a router's cache.

    The system has no memory for a page that was never used.
    """
    opened, stream = WAYS[FILLING_WAY]
    tokens = CACHE_TOKENS // FILLING_REQUESTS - PROMPT_TOKENS
    with opened(ports, FILLING_REQUESTS, tokens, stream) as once:
        once()


def memory(ports: Ports, folder: Path) -> dict[str, dict[str, float]]:
    """Return the memory of gateways, of routers whose caches are full, and of actors."""
    from router.client import Client

    with Client(ports.grpc_address) as client:
        status = client.status()
    processes = {f"gateway {i}": (p.pid, 0.0) for i, p in enumerate(status.gateways)}
    held_mb = dense_mb(folder) + cache_mb(CACHE_TOKENS)
    processes |= {f"router {i}": (p.pid, held_mb) for i, p in enumerate(status.routers)}
    processes |= {a.actor_id: (a.pid, expert_mb(len(a.experts))) for a in status.actors}
    return {name: memory_of(pid, weights_mb) for name, (pid, weights_mb) in processes.items()}


def router_layers() -> dict[str, Any]:
    """Return the times of the router's latest layers, prefills' too, and its calls."""
    from ray import serve

    handle = serve.get_deployment_handle(f"Router-{MODEL}", app_name=MODEL)
    stats = handle.stats.remote().result(timeout_s=30)
    return {"layer": summary_ms(stats["layer_s"]), "calls": stats["calls"]}


def engine_alone(
    begin: Callable[[str], None], folder: Path, actors: int, clients: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Return the speed and processor time of the engine and actors without a deployment."""
    begin("router's engine")
    measured = engine.measure(folder, "auto", actors, [str(clients)], tokens, rounds)
    alone: dict[str, Any] = measured["streams"][str(clients)]
    return alone


def run(clients: int, tokens: int, rounds: int, actors: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    result: dict[str, Any] = {
        "sizes": SIZES,
        "clients": clients,
        "tokens": tokens,
        "actors": actors,
    }
    with tempfile.TemporaryDirectory() as name, progress("serve", 6 + 2 * len(WAYS)) as begin:
        folder = Path(name)
        begin("checkpoint")
        make_checkpoint(folder)
        begin(TRANSFORMERS)
        one_process = baseline.measure(folder, [clients], tokens, rounds)
        result["transformers"] = one_process[str(clients)]
        turns = [engine_alone(begin, folder, actors, clients, tokens, rounds)]
        begin("deployment")
        with deployed(folder, actors) as ports:
            of_way: dict[str, list[Turn]] = {way: [] for way in WAYS}
            for way in (*WAYS, *reversed([*WAYS])):
                begin(way)
                of_way[way].append(measure(ports, way, clients, tokens, rounds))
            result["ways"] = {
                way: {
                    **summarize([one for some, _ in both for one in some], WAYS[way][1]),
                    "processor_us": mean([spent_us for _, spent_us in both]),
                }
                for way, both in of_way.items()
            }
            result["router"] = router_layers()
            begin("full cache")
            fill_cache(ports)
            result["memory"] = memory(ports, folder)
        turns.append(engine_alone(begin, folder, actors, clients, tokens, rounds))
    result["engine"] = {
        "tokens_per_s": statistics.mean(turn["tokens_per_s"] for turn in turns),
        "turns_tokens_per_s": [turn["tokens_per_s"] for turn in turns],
        "processor_us": mean([turn["processor_us"] for turn in turns]),
    }
    for name, side in (("ratio", "transformers"), ("of_engine", "engine")):
        rate = result[side]["tokens_per_s"]
        result[name] = {way: one["tokens_per_s"] / rate for way, one in result["ways"].items()}
    return result


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    rows = []
    for way, one in result["ways"].items():
        ratios = (result["ratio"][way], result["of_engine"][way])
        latencies = [one.get(name, {}).get(p) for name in LATENCIES for p in ("p50_ms", "p99_ms")]
        rows.append((way, one["tokens_per_s"], *ratios, *latencies))
    alone, engine_alone = (result[side]["tokens_per_s"] for side in ("transformers", "engine"))
    for name, rate in ((TRANSFORMERS, alone), (ENGINE, engine_alone)):
        rows.append((name, rate, rate / alone, rate / engine_alone, *[None] * 6))
    columns = ["", "tok/s|.0f", "/ transformers|.2f", "/ engine|.2f"]
    for name in ("first token", "between", "request"):
        columns += [f"{name} p50 ms|.1f", "p99|.1f"]
    show(f"serve, {result['clients']} clients", rows, columns)
    show_processor_time(result)
    show_memory(result["memory"])


def show_processor_time(result: Mapping[str, Any]) -> None:
    """Print the processor time of a token, by process."""
    sides = {way: one["processor_us"] for way, one in result["ways"].items()}
    sides[ENGINE] = result["engine"]["processor_us"]
    names = list(dict.fromkeys(name for spent_us in sides.values() for name in spent_us))
    rows = [
        (side, sum(spent_us.values()), *(spent_us.get(n, 0.0) for n in names))
        for side, spent_us in sides.items()
    ]
    show("processor time, µs a token", rows, ["", *(f"{name}|.0f" for name in ("all", *names))])


def main() -> None:
    """Parse the command line and run."""
    parser = command("serve", __doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--actors", type=int, default=2)
    avx2.add_option(parser)
    options = parser.parse_args()
    if options.avx2:
        avx2.use_alone(parser)
    result = run(options.clients, options.tokens, options.rounds, options.actors)
    report(result)
    write_json("serve", result, options.json)


if __name__ == "__main__":
    main()
