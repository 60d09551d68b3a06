"""How throughput grows with the number of devices, on emulated ones, with two routers.

    python -m benchmarks.scaling [--devices 1 2 4 8] [--seconds 12] [--quick] [--json FILE]
        [--compare OLD.json] [--plot FOLDER]

Serves a checkpoint whose tokens choose their experts themselves (``benchmarks.steered``), through
the whole deployment, over expert actors that take an accelerator's time and compute nothing
(``experts.emulate``). Sixteen streams that never end take, each, an expert of their own; then all
the same expert; then any expert for each token. A second of these devices is the same on any
machine, as long as routers and actors have processor time left, which is measured too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from benchmarks import steered
from benchmarks.common import (
    MODEL,
    Figure,
    finish,
    machine,
    output_options,
    progress,
    show,
)
from benchmarks.device_lines import TITLES, picture
from benchmarks.serve import served
from benchmarks.serve_clients import Ports
from benchmarks.steered import Traffic

if TYPE_CHECKING:
    from benchmarks.devices import Product

BATCH_S, ROW_S = 0.010, 0.030
"""An expert's product takes 40 ms for a row: ten times what all processes together need for it."""
ROUTERS = 2
OTHER_ROUTERS = (1, 4)
"""How many routers are tried too, with the most devices, for the traffics that can use them."""
DEVICES = (1, 2, 4, 8)
QUICK_DEVICES = (1, 8)
SECONDS, QUICK_SECONDS = 12.0, 6.0
PICTURE_S = 1.0
APART_S = 0.1
"""Between the starts of two streams, so that Serve sees which router has fewer and takes it."""
TIMEOUT_S = 600.0
TOKENS = 3000
TRAFFICS: tuple[Traffic, ...] = get_args(Traffic)
ROUTER_TRAFFICS: tuple[Traffic, ...] = ("own", "spread")


class Streams:
    """Clients that each read one endless stream, and when they got how many tokens."""

    def __init__(self, ports: Ports, tokens: Sequence[int], apart_s: float = APART_S) -> None:
        """Start one for each token, one after the other."""
        from router.client import Client

        self._client = Client(ports.grpc_address)
        self._tokens = tokens
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(len(tokens))
        self.arrivals: list[list[tuple[float, int]]] = [[] for _ in tokens]
        self._reading = []
        # Those of one expert after each other, so that each of two routers gets one of them.
        order = sorted(range(len(tokens)), key=lambda one: steered.expert_of(0, tokens[one]))
        for stream in order:
            self._reading.append(self._pool.submit(self._read, stream))
            time.sleep(apart_s)

    def _read(self, stream: int) -> None:
        from router.client import Sampling

        token = self._tokens[stream]
        sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        pieces = self._client.stream([token], sampling, model=MODEL, timeout_s=TIMEOUT_S)
        for piece in pieces:
            if piece.exact:
                raise RuntimeError("an answer of emulated experts says that it is exact")
            for one in piece.token_ids:
                token = steered.next_token(token)
                if one != token:
                    raise RuntimeError(f"stream {stream} said {one}, not {token}: not steered")
            self.arrivals[stream].append((time.perf_counter(), len(piece.token_ids)))
            if self._stopping.is_set():
                pieces.close()
                return

    def wait_started(self) -> None:
        """Return when every stream has had a few tokens; raises what a stream failed with."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while min(map(len, self.arrivals)) < 3:
            self.check()
            if time.monotonic() > deadline_s:
                raise TimeoutError("the streams did not start")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise what a stream has failed with."""
        for reading in self._reading:
            if reading.done():
                reading.result()
                raise RuntimeError("a stream ended by itself")

    def stop(self) -> None:
        """End all streams, each at its next token."""
        self._stopping.set()
        for reading in self._reading:
            reading.result(TIMEOUT_S)
        self._pool.shutdown()
        self._client.close()


def rate(arrivals: Sequence[tuple[float, int]], start_s: float, end_s: float) -> float:
    """Return a stream's tokens per second within a time, from its first piece there to its last.

    So that it does not matter how the ends of the time lie between two tokens. Zero where there
    are fewer than two pieces.
    """
    within = [(at_s, tokens) for at_s, tokens in arrivals if start_s <= at_s <= end_s]
    if len(within) < 2:
        return 0.0
    return sum(tokens for _, tokens in within[1:]) / (within[-1][0] - within[0][0])


def cpu_s() -> float:
    """Return the processor seconds that this process and all below it have used, Ray's too."""
    import psutil

    own = psutil.Process()
    total_s = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # it ended a moment ago
            total_s += sum(process.cpu_times()[:2])
    return total_s


def busy_share(products: Sequence[Product], start_s: float, end_s: float) -> float:
    """Return the part of a time in which a device was computing."""
    busy_s = sum(max(0.0, min(one.end_s, end_s) - max(one.start_s, start_s)) for one in products)
    return busy_s / (end_s - start_s)


def measure(ports: Ports, traffic: Traffic, seconds: float) -> dict[str, Any]:
    """Load the deployment with one kind of traffic; returns rates, busy shares, and a second."""
    tokens = [steered.first_token(traffic, stream) for stream in range(steered.STREAMS)]
    streams = Streams(ports, tokens)
    try:
        streams.wait_started()
        return measure_streams(streams, seconds)
    finally:
        streams.stop()


def measure_streams(streams: Streams, seconds: float) -> dict[str, Any]:
    """Return rates and busy shares of streams that run, and a second of what devices did."""
    from benchmarks.devices import recorded

    start_s, used_s = time.perf_counter(), cpu_s()
    time.sleep(seconds)
    end_s = time.perf_counter()
    used_s = cpu_s() - used_s
    streams.check()
    products = recorded(MODEL)
    rates = [rate(arrivals, start_s, end_s) for arrivals in streams.arrivals]
    middle_s = (start_s + end_s) / 2
    return {
        "tokens_per_s": sum(rates),
        "slowest_stream": min(rates),
        "busy": {name: busy_share(one, start_s, end_s) for name, one in products.items()},
        "cores_used": used_s / (end_s - start_s),
        "rows_per_product": statistics.mean(
            len(one.tokens)
            for some in products.values()
            for one in some
            if start_s <= one.start_s <= end_s
        ),
        "lines": lines(products, middle_s, middle_s + PICTURE_S),
    }


def lines(
    products: Mapping[str, Sequence[Product]], start_s: float, end_s: float
) -> dict[str, list[list[Any]]]:
    """Return, by device, start and end (seconds after ``start_s``) and streams of its products."""
    return {
        name: [
            [one.start_s - start_s, one.end_s - start_s, [steered.stream_of(t) for t in one.tokens]]
            for one in some
            if one.end_s > start_s and one.start_s < end_s
        ]
        for name, some in products.items()
    }


def run(devices: Sequence[int], seconds: float, is_quick: bool) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes.

    ``devices`` ascend. Where it ``is_quick``, with two routers only.
    """
    result: dict[str, Any] = {
        "benchmark": "scaling",
        "machine": machine(),
        "actors": list(devices),
        "routers": ROUTERS,
        "streams": steered.STREAMS,
        "batch_s": BATCH_S,
        "row_s": ROW_S,
        "traffic": {traffic: {} for traffic in TRAFFICS},
        "by_routers": {},
    }
    others = () if is_quick else OTHER_ROUTERS
    total = len(devices) * (1 + len(TRAFFICS)) + len(others) * (1 + len(ROUTER_TRAFFICS))
    with tempfile.TemporaryDirectory() as name, progress("scaling", total) as begin:
        folder = Path(name)
        steered.save(folder)
        for count in devices:
            begin(f"{count} devices")
            with served(_application, _args(folder, count, ROUTERS)) as ports:
                for traffic in TRAFFICS:
                    begin(f"{count} devices, {TITLES[traffic]}")
                    result["traffic"][traffic][str(count)] = measure(ports, traffic, seconds)
        for routers in others:
            begin(f"{routers} routers")
            measured = result["by_routers"][str(routers)] = {}
            with served(_application, _args(folder, devices[-1], routers)) as ports:
                for traffic in ROUTER_TRAFFICS:
                    begin(f"{routers} routers, {TITLES[traffic]}")
                    measured[traffic] = measure(ports, traffic, seconds)
    result["gain"] = gains(result["traffic"])
    return result


def _application(args: dict[str, Any]) -> Any:
    from benchmarks.recording import RecordingController
    from router.app import application

    return application(args, RecordingController)


def _args(folder: Path, devices: int, routers: int) -> dict[str, Any]:
    return {
        "models": [{"id": MODEL, "path": str(folder)}],
        "experts": {"actors": devices, "emulate": {"batch_s": BATCH_S, "row_s": ROW_S}},
        "router": {"replicas": routers},
    }


def gains(traffic: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the speed over that of the fewest devices: by traffic, devices."""
    return {
        kind: {
            count: one["tokens_per_s"] / by_count[min(by_count, key=int)]["tokens_per_s"]
            for count, one in by_count.items()
        }
        for kind, by_count in traffic.items()
    }


def comparable(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by; one expert's gain is context."""
    figures = {}
    for traffic, by_count in result["traffic"].items():
        for count, one in by_count.items():
            case = f"{traffic}, {count} devices"
            figures[f"{case}, tokens/s"] = Figure(one["tokens_per_s"], "higher")
            better: Any = "context" if traffic == "one" else "higher"
            figures[f"{case}, gain"] = Figure(result["gain"][traffic][count], better)
    return figures


def report(result: Mapping[str, Any]) -> None:
    """Print a table for each kind of traffic."""
    columns = ["tok/s", "gain", "busy, mean", "least busy", "rows a product", "cores used"]
    for traffic, by_count in result["traffic"].items():
        fewest = min(by_count, key=int)
        alone = by_count[fewest]["tokens_per_s"]
        title = f"{TITLES[traffic]}: {result['streams']} streams, {result['routers']} routers"
        rows = [(count, *_cells(one, alone)) for count, one in by_count.items()]
        show(title, rows, ["devices", *columns])
        most = max(by_count, key=int)
        others = {n: one[traffic] for n, one in result["by_routers"].items() if traffic in one}
        if others:
            some = {**others, str(result["routers"]): by_count[most]}
            rows = [(n, *_cells(some[n], alone)) for n in sorted(some, key=int)]
            show(f"{TITLES[traffic]}: {most} devices", rows, ["routers", *columns])


def _cells(one: Mapping[str, Any], alone: float) -> tuple[str, ...]:
    """Return a case's figures for a table; ``alone`` is the rate with the fewest devices."""
    busy = one["busy"].values()
    return (
        f"{one['tokens_per_s']:.1f}",
        f"{one['tokens_per_s'] / alone:.2f}",
        f"{statistics.mean(busy):.1%}",
        f"{min(busy):.1%}",
        f"{one['rows_per_product']:.2f}",
        f"{one['cores_used']:.2f}",
    )


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", metavar="N")
    parser.add_argument("--seconds", type=float, help="how long each case is measured")
    parser.add_argument("--quick", action="store_true", help="1 and 8 devices, 6 seconds each")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write the pictures here")
    output_options(parser)
    options = parser.parse_args()
    devices = options.devices or (QUICK_DEVICES if options.quick else DEVICES)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    result = run(sorted(set(devices)), seconds, options.quick)
    report(result)
    if options.plot is not None:
        (options.plot / "scaling.svg").write_text(picture(result), encoding="utf-8")
    return finish(result, comparable(result), options)


if __name__ == "__main__":
    sys.exit(main())
