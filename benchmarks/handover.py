"""What clients without retries see while gateways are replaced, added and taken away.

    python -m benchmarks.handover [--redeploys 10] [--clients 8] [--json FILE]

``benchmarks/README.md`` describes the clients and the changes, each of which is proved by the
gateways' pids. Prints a verdict for each kind of client; the exit status is 1 when one is missed.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from benchmarks.common import MODEL, Verdict, command, progress, show_verdicts, write_json
from benchmarks.serve_clients import Ports
from benchmarks.shipped import free_ports, with_ports

MODEL_PATH, OTHER = "models/mesh-tiny", "other"
REDEPLOYS, CLIENTS = 10, 8
CALL_S, CHANGE_S, SETTLE_S = 60.0, 300.0, 3.0
HTTP, HTTP_NEW = "HTTP, kept connections", "HTTP, a new connection each"
GRPC, GRPC_NEW = "gRPC, kept channels", "gRPC, a new channel each"
GRPC_ONCE = "gRPC, kept channels, enable_retries: 0"
MAX_LOST = {HTTP: 0.0, HTTP_NEW: 0.0, GRPC: 0.0, GRPC_NEW: 1e-4, GRPC_ONCE: 1e-3}
"""The share of calls that may fail, by kind. Without retries grpcio's client fails a call that it
has not sent yet when GOAWAY comes, whenever a connection ends by its age."""
_OWN = ("grpc.use_local_subchannel_pool", 1)
_LIVE = "/inference.GRPCInferenceService/ServerLive"


class Clients:
    """Threads that call while a block runs."""

    def __init__(self, ports: Ports) -> None:
        self.answered: Counter[str] = Counter()
        self.failures: dict[str, Counter[str]] = {kind: Counter() for kind in MAX_LOST}
        self._ports = ports
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def calling(self, count: int) -> Iterator[None]:
        """Have so many threads of each kind call until the block ends."""
        threads = [
            threading.Thread(
                target=self._over_http if kind in (HTTP, HTTP_NEW) else self._over_grpc,
                args=(kind,),
            )
            for kind in MAX_LOST
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(2 * CALL_S)

    def _note(self, kind: str, failure: str = "") -> None:
        with self._lock:
            if failure:
                self.failures[kind][failure] += 1
            else:
                self.answered[kind] += 1

    def _over_http(self, kind: str) -> None:
        connection = None
        while not self._ended.is_set():
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self._ports.http, CALL_S)
            try:
                connection.request("GET", "/v2/health/live")
                answer = connection.getresponse()
                answer.read()
                self._note(kind, "" if answer.status == 200 else f"status {answer.status}")
            except (OSError, http.client.HTTPException) as error:
                self._note(kind, repr(error))
                answer = None
            if answer is None or answer.will_close or kind == HTTP_NEW:
                connection.close()
                connection = None

    def _over_grpc(self, kind: str) -> None:
        channel, retries = None, ("grpc.enable_retries", int(kind == GRPC))
        while not self._ended.is_set():
            if channel is None:
                channel = grpc.insecure_channel(self._ports.grpc_address, options=(_OWN, retries))
            try:
                channel.unary_unary(_LIVE)(b"", timeout=CALL_S)
                self._note(kind)
            except grpc.RpcError as error:
                self._note(kind, f"{error.code().name}: {error.details()}")
            if kind == GRPC_NEW:
                channel.close()
                channel = None


class Deployment:
    """The deployment that is changed."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._number = 0

    def args(self, gateways: int = 1) -> dict[str, Any]:
        """Return args that differ from all before."""
        self._number += 1
        return with_ports(
            {
                "models": [{"id": MODEL, "path": MODEL_PATH}],
                "experts": {"actors": 1},
                "router": {"max_batch_size": 8 + self._number},
                "gateway": {"replicas": gateways},
            },
            self._ports.http,
            self._ports.grpc,
        )

    def pids(self) -> set[int]:
        """Return the pids of the gateways that live."""
        from router.client import Client

        with Client(self._ports.grpc_address) as client:
            return {gateway.pid for gateway in client.status().gateways}

    def change(self, gateways: int) -> None:
        """Deploy anew, with so many gateways; returns once all of them are new."""
        from ray import serve

        from router.app import build

        before = self.pids()
        serve.run(build(self.args(gateways)), name=MODEL, route_prefix=None)
        until_s = time.monotonic() + CHANGE_S
        while (now := self.pids()) & before or len(now) != gateways:
            if time.monotonic() > until_s:
                raise TimeoutError(f"gateways {before} are not replaced after {CHANGE_S:.0f} s")
            time.sleep(0.5)


def other_comes_and_goes() -> None:
    """Deploy a second application on ports of its own, and delete it."""
    from ray import serve

    from router.app import build

    args = {"models": [{"id": OTHER, "path": MODEL_PATH}], "experts": {"actors": 1}}
    serve.run(build(with_ports(args, *free_ports(2))), name=OTHER, route_prefix=None)
    serve.delete(OTHER)


def run(redeploys: int, count: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    from benchmarks.serve import served
    from router.app import build

    ports = Ports(*free_ports(2))
    deployment, clients = Deployment(ports), Clients(ports)
    with (
        progress("handover", redeploys + 4) as begin,
        served(build, deployment.args(), ports=ports),
        clients.calling(count),
    ):
        for number in range(redeploys):
            begin(f"redeploy {number + 1}")
            deployment.change(1)
        begin("a second application")
        other_comes_and_goes()
        for gateways in (3, 1):
            begin(f"{gateways} gateways")
            deployment.change(gateways)
        begin("calm")
        time.sleep(SETTLE_S)
    return {
        "redeploys": redeploys,
        "clients": count * len(MAX_LOST),
        "calls": {
            kind: {"answered": clients.answered[kind], "failures": dict(failures)}
            for kind, failures in clients.failures.items()
        },
    }


def judge(result: Mapping[str, Any]) -> list[Verdict]:
    """Judge every kind of client."""
    verdicts = []
    for kind, most_lost in MAX_LOST.items():
        calls = result["calls"][kind]
        failed = sum(calls["failures"].values())
        total = calls["answered"] + failed
        promised = "none" if not most_lost else f"at most 1 of {1 / most_lost:,.0f}"
        is_kept = total > 0 and failed <= most_lost * total
        verdicts.append(Verdict(kind, f"{failed} of {total:,} failed", promised, is_kept))
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = command("handover", __doc__)
    parser.add_argument("--redeploys", type=int, default=REDEPLOYS, metavar="N")
    parser.add_argument("--clients", type=int, default=CLIENTS, metavar="N")
    options = parser.parse_args(argv)
    result = run(options.redeploys, options.clients)
    title = f"calls during {options.redeploys + 3} changes of the gateways"
    status = show_verdicts(title, judge(result))
    for kind, calls in result["calls"].items():
        for failure, number in calls["failures"].items():
            print(f"{kind}: {number} x {failure}")
    write_json("handover", result, options.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
