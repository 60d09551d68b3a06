"""How long ``serve run`` of the shipped deployment takes to its first answer, beside Serve alone.

    python -m benchmarks.start [--rounds 3] [--json FILE]

Starts the shipped deployment and an application of one line by turns. The machine's own speed is
told by a loop of Python, for starts are mostly imports.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from ray import serve

from benchmarks.common import command, progress, show, write_json
from benchmarks.shipped import free_ports, serve_command, shipped_document
from router.ops.startup.announce import Endpoint, why_not_ready
from router.serve.options import completed

MODEL = "mesh-tiny"
ROUNDS = 3
POLL_S, TIMEOUT_S = 0.1, 180.0
LOOP = 10_000_000
OURS, ALONE = "expertmesh", "Serve alone"
RAY = "Ray and Serve"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


class Hello:
    """An application that needs nothing, and listens by itself as a gateway does."""

    async def __init__(self, port: int) -> None:  # type: ignore[misc]  # Serve awaits it
        """Answer any request."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)
            writer.close()

        self._server = await asyncio.start_server(answer, "127.0.0.1", port)


def hello(args: Mapping[str, Any]) -> serve.Application:
    """Build the application."""
    return serve.deployment(Hello).bind(args["port"])


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds to the first answer and from Ctrl-C to the end; ``cpu_s`` by process."""

    answer_s: float
    end_s: float
    cpu_s: dict[str, float]


def process_name(command_line: str) -> str:
    """Return whose process it is: a part of ours by its name, or :data:`RAY`."""
    replica = re.match(r"ray::ServeReplica:\w+:(\w+)", command_line)
    if replica is not None and replica[1] != Hello.__name__:
        return replica[1].lower()
    return "expert actor" if "ExpertActor" in command_line else RAY


def measure(document: Mapping[str, Any], answers: Callable[[], bool]) -> Start:
    """Start a deployment file, wait until ``answers``, and end it; raises when it ends by itself.

    Nothing is left of it whatever happens, for Ray ends with the command.
    """
    with tempfile.TemporaryDirectory() as name:
        file, log = Path(name) / "cluster.yaml", Path(name) / "log"
        file.write_text(yaml.safe_dump(dict(document), sort_keys=False), encoding="utf-8")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        paths = [os.getcwd(), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        started_s = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                serve_command(file),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            while not answers():
                if process.poll() is not None or time.perf_counter() - started_s > TIMEOUT_S:
                    raise RuntimeError(f"no answer; serve run said: {log.read_text()[-2000:]}")
                time.sleep(POLL_S)
            answer_s = time.perf_counter() - started_s
            used_s = cpu_s(process.pid)
        finally:
            ending_s = time.perf_counter()
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT_S)
    return Start(answer_s, time.perf_counter() - ending_s, used_s)


def cpu_s(pid: int) -> dict[str, float]:
    """Return the processor seconds of a command and all that runs below it, by name."""
    import psutil

    used: defaultdict[str, float] = defaultdict(float)
    command = psutil.Process(pid)
    for one in [command, *command.children(recursive=True)]:
        try:
            times, line = one.cpu_times(), " ".join(one.cmdline())
        except psutil.Error:  # it has just ended
            continue
        used[process_name(line)] += times.user + times.system
    return dict(used)


def start_ours() -> Start:
    """Start what is shipped; its model answers a request of one token."""
    http, grpc = free_ports(2)
    endpoint = Endpoint(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", (MODEL,))
    return measure(shipped_document(http, grpc), lambda: why_not_ready(endpoint) is None)


def start_alone() -> Start:
    """Start the application of one line, with the same options of Serve."""
    [http] = free_ports(1)
    application = {
        "name": "hello",
        "import_path": "benchmarks.start:hello",
        "args": {"port": http},
    }
    document = completed({"applications": [application]})

    def answers() -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{http}/", timeout=5) as answer:
                return bool(answer.read() == b"hello")
        except OSError:
            return False

    return measure(document, answers)


def loop_s() -> float:
    """Return what ten million additions of a loop take here."""
    started_s, total = time.perf_counter(), 0
    for one in range(LOOP):
        total += one
    return time.perf_counter() - started_s


def summary(starts: Sequence[Start]) -> dict[str, Any]:
    """Return the medians of several starts, of each part too."""
    names = sorted({name for start in starts for name in start.cpu_s})
    return {
        "answer_s": statistics.median(start.answer_s for start in starts),
        "answers_s": [round(start.answer_s, 1) for start in starts],
        "end_s": statistics.median(start.end_s for start in starts),
        "cpu_s": {
            name: statistics.median(start.cpu_s.get(name, 0.0) for start in starts)
            for name in names
        },
    }


def run(rounds: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    kinds = {OURS: start_ours, ALONE: start_alone}
    starts: dict[str, list[Start]] = {kind: [] for kind in kinds}
    with progress("start", rounds * len(kinds)) as begin:
        for _ in range(rounds):
            for kind, start in kinds.items():
                begin(kind)
                starts[kind].append(start())
    return {"loop_s": loop_s(), **{kind: summary(those) for kind, those in starts.items()}}


def show_result(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    rows = [
        (
            kind,
            result[kind]["answer_s"],
            " ".join(f"{one:.1f}" for one in result[kind]["answers_s"]),
            result[kind]["end_s"],
            sum(result[kind]["cpu_s"].values()),
        )
        for kind in (OURS, ALONE)
    ]
    title = f"serve run, s (ten million additions of Python: {result['loop_s']:.2f} s)"
    show(title, rows, ["", "first answer|.1f", "each", "Ctrl-C to end|.1f", "processor|.1f"])
    parts = sorted(result[OURS]["cpu_s"].items(), key=lambda part: -part[1])
    show("processor seconds until the first answer", parts, ["processes", "s|.1f"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = command("start", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    options = parser.parse_args(argv)
    result = run(options.rounds)
    show_result(result)
    write_json("start", result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
