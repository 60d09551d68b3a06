"""Thousands of mutated wires at every port of a deployment, which must not show.

    python -m benchmarks.wires [--count 10000] [--seed N] [--json FILE]

Serves the bundled model (gateway, router, two expert actors, fp32) and sends wires: HTTP requests
and HTTP/2 bytes, HTTP bodies and gRPC messages, bytes at the actors' stream sockets and TCP ports
without a key, frames with one, frames by Ray's calls, bytes at the gateways' own ports. After every
few one asks for a text, by HTTP or gRPC, which must be what it was before the first. Prints what
came back; the exit status is 1 when an answer was wrong or failed, a process is another one than
before or has grown, or somebody said that the server failed.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import MODEL, command, progress, show, write_json
from benchmarks.growth import Sampler, show_growth

if TYPE_CHECKING:
    from benchmarks.fuzzing.hostile import Places
    from cluster.reports import ClusterStatus
    from router.client import Client

MODEL_PATH = "models/mesh-tiny"
HIDDEN_SIZE = 192
ACTORS = 2
SENDERS = 16
CANARY_EVERY, CANARY_TOKENS = 25, 12
CANARIES = ((5, 6, 7, 8), (900, 31, 77), (12,), (400, 401, 402, 403, 404, 405))
"""Prompts, as token ids."""
PART = 200
"""Wires to one step of the progress."""
FAILURES = frozenset({"INTERNAL", "UNKNOWN", "InternalError", "500", "502", "no answer"})
"""What a server says, or does not say, that did not expect what came."""


def pids_of(status: ClusterStatus) -> dict[str, list[int]]:
    """Return the pids of all parts."""
    return {
        "controller": [status.controller_pid],
        "routers": sorted(one.pid for one in status.routers),
        "gateways": sorted(one.pid for one in status.gateways),
        "actors": sorted(one.pid for one in status.actors),
    }


def places_of(
    status: ClusterStatus, app: str, model: str, hidden_size: int, http_port: int, grpc_port: int
) -> Places:
    """Return where a deployment on this machine, whose Ray this process has joined, is reached."""
    import psutil
    import ray
    from ray.util import list_named_actors

    from benchmarks.fuzzing.hostile import Actor, Places
    from cluster.spec import model_id_of

    names = [one for one in list_named_actors(True) if one["name"].startswith(f"expertmesh:{app}:")]
    handles = [ray.get_actor(one["name"], one["namespace"]) for one in names]
    reports = ray.get([handle.describe.remote() for handle in handles], timeout=30)
    actors = [
        Actor(handle, [tuple(key) for key in report.experts if model_id_of(key.model) == model])
        for handle, report in zip(handles, reports, strict=True)
    ]
    ports = [
        (connection.laddr.ip if connection.laddr.ip not in ("0.0.0.0", "::") else "127.0.0.1",
         connection.laddr.port)
        for gateway in status.gateways
        for connection in psutil.Process(gateway.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]  # fmt: skip
    local = "127.0.0.1"
    return Places(
        model,
        hidden_size,
        (local, http_port),
        (local, grpc_port),
        [actor for actor in actors if actor.experts],
        ports,
    )


class Canaries:
    """Good requests, with what the deployment made of them before the first wire."""

    def __init__(self, client: Client, model: str, http_port: int) -> None:
        """Ask for each once; raises whatever a request may."""
        self._client = client
        self._model = model
        self._http_port = http_port
        self._expected = [self._by_grpc(prompt) for prompt in CANARIES]

    def ask(self, number: int) -> str:
        """Ask for one, by HTTP or gRPC; returns ``exact``, ``wrong`` or why there is no answer."""
        which = number % len(CANARIES)
        ask = self._by_grpc if number // len(CANARIES) % 2 else self._by_http
        try:
            return "exact" if ask(CANARIES[which]) == self._expected[which] else "wrong"
        except Exception as error:  # whatever it is, there was no answer
            return f"{type(error).__name__}: {str(error)[:80]}"

    def _by_grpc(self, prompt: Sequence[int]) -> tuple[int, ...]:
        from router.client import Sampling

        sampling = Sampling(max_tokens=CANARY_TOKENS, temperature=0.0, ignore_eos=True)
        [reply] = self._client.generate(list(prompt), sampling, model=self._model, timeout_s=60)
        return tuple(reply.token_ids)

    def _by_http(self, prompt: Sequence[int]) -> tuple[int, ...]:
        import httpx

        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": CANARY_TOKENS,
            "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        url = f"http://127.0.0.1:{self._http_port}/v1/completions"
        answer = httpx.post(url, json=body, timeout=60).raise_for_status()
        return tuple(answer.json()["choices"][0]["token_ids"])


def bombard(
    places: Places, canaries: Canaries, count: int, seed: int, told: Callable[[int], None]
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Send ``count`` wires; returns by kind what came back, and how the canaries fared.

    ``told`` is given the number of wires sent, now and then.
    """
    from benchmarks.fuzzing.hostile import Wires

    wires = Wires(places, seed)
    came: dict[str, Counter[str]] = {name: Counter() for name in wires.kinds}
    fared: Counter[str] = Counter()

    def one(number: int) -> tuple[tuple[str, str], str | None]:
        sent = wires.send(number)
        is_due = number % CANARY_EVERY == CANARY_EVERY - 1
        return sent, canaries.ask(number // CANARY_EVERY) if is_due else None

    try:
        with ThreadPoolExecutor(SENDERS) as pool:
            for number, ((kind, code), canary) in enumerate(pool.map(one, range(count)), 1):
                came[kind][code] += 1
                if canary is not None:
                    fared[canary] += 1
                if number % PART == 0:
                    told(number)
    finally:
        wires.close()
    return {kind: dict(codes) for kind, codes in came.items()}, dict(fared)


def run(count: int, seed: int) -> dict[str, Any]:
    """Run the whole bombardment; returns what ``--json`` writes."""
    from benchmarks.serve import deployed
    from router.client import Client

    with progress("wires", 2 + count // PART) as begin:
        begin("deployment")
        served = deployed(Path(MODEL_PATH), ACTORS)
        with served as ports, Client(ports.grpc_address, retry=None) as client:
            begin("answers before the first wire")
            canaries = Canaries(client, MODEL, ports.http)
            status = client.status()
            places = places_of(status, MODEL, MODEL, HIDDEN_SIZE, ports.http, ports.grpc)
            sampler, started_s = Sampler(), time.monotonic()
            came, fared = bombard(
                places, canaries, count, seed, lambda sent: begin(f"{sent} wires")
            )
            took_s = time.monotonic() - started_s
            after = pids_of(client.status())
            processes = sampler.end()
    return {
        "count": count,
        "seed": seed,
        "took_s": took_s,
        "came": came,
        "canaries": fared,
        "pids_before": pids_of(status),
        "pids_after": after,
        "processes": [asdict(one) for one in processes],
    }


def problems(result: Mapping[str, Any]) -> list[str]:
    """Return what is not as it must be."""
    found = [f"a canary: {how}" for how in result["canaries"] if how != "exact"]
    if not result["canaries"].get("exact"):
        found.append("no canary was answered")
    if result["pids_before"] != result["pids_after"]:
        found.append(f"pids were {result['pids_before']} and are {result['pids_after']}")
    for kind, codes in result["came"].items():
        found += [f"{kind}: {codes[code]} times {code}" for code in sorted(FAILURES & codes.keys())]
    found += [
        f"{one['name']} {one['pid']} grows by {one['mb_per_min']:.1f} MB and "
        f"{one['descriptors_per_min']:.1f} descriptors a minute"
        for one in result["processes"]
        if not one["is_flat"]
    ]
    return found


def report(result: Mapping[str, Any]) -> None:
    """Print the tables and the verdict."""
    rows = [
        (
            kind,
            sum(codes.values()),
            ", ".join(f"{n} {code}" for code, n in sorted(codes.items(), key=lambda one: -one[1])),
        )
        for kind, codes in result["came"].items()
    ]
    title = f"{result['count']} wires in {result['took_s']:.0f} s, seed {result['seed']}"
    show(title, rows, ["wire", "sent", "what came back"])
    told = ", ".join(f"{count} {how}" for how, count in result["canaries"].items())
    print(f"canaries: {told}")
    for part, pids in result["pids_after"].items():
        same = "the same" if pids == result["pids_before"][part] else "NOT those before"
        print(f"{part}: pids {', '.join(map(str, pids))}, {same}")
    show_growth(result["processes"])
    for problem in problems(result):
        print(f"problem: {problem}")


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command("wires", __doc__)
    parser.add_argument("--count", type=int, default=10_000, help="wires to send")
    parser.add_argument("--seed", type=int, default=0, help="the same seed has the same wires")
    options = parser.parse_args()
    result = run(options.count, options.seed)
    report(result)
    write_json("wires", result, options.json)
    return bool(problems(result))


if __name__ == "__main__":
    sys.exit(main())
