"""``expertmesh stop`` and ``logs``: what runs in a Ray cluster."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Annotated, Any

import typer

from router.cli.common import UNREACHABLE, fail, write

ACTOR_CLASSES = ("ServeReplica:", "RemoteExpertActor")
TIMEOUT_S, MAX_ACTORS, POLL_S = 30, 10_000, 0.2


def stop() -> None:
    """End what this machine's Ray cluster serves, once the requests under way are done.

    Example: expertmesh stop

    New requests are refused meanwhile. Ctrl-C ends those under way. `expertmesh serve` ends with
    it; a cluster that `ray start` made goes on. RAY_ADDRESS names one of several clusters.
    """
    _join()
    from ray import serve

    from router.ops.startup.drain import ServedGateways, drain, end_requests

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of each handle
    gateways, cut = ServedGateways(), Event()
    try:
        left = drain(gateways, cut, lambda begun: write("waiting for the requests under way\n"))
    except KeyboardInterrupt:
        left = 1
    if left:
        end_requests(gateways)
    serve.shutdown()
    write("expertmesh: nothing is served any more\n")


def _join() -> Path:
    """Join this machine's Ray cluster, with its token; ends the command if none runs.

    Returns the folder of the logs of this node.
    """
    from router.ops.doctor.running_ray import loopback_of, raylets
    from router.ops.startup.ray_token import send_token

    named = os.environ.get("RAY_ADDRESS", "auto")
    if not raylets():
        fail("nothing runs here: no Ray runs on this machine", UNREACHABLE)
    send_token(None)
    address = "auto" if named == "local" else named
    os.environ.update(loopback_of(address))
    import ray

    try:
        context = ray.init(address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        fail(f"the Ray on this machine cannot be joined: {error}", UNREACHABLE)
    return Path(context.address_info["session_dir"]) / "logs"


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="The last lines of each process.")
    ] = 100,
) -> None:
    """Show the log lines of all processes of ExpertMesh, on all nodes of a cluster.

    Example: expertmesh logs -f

    It asks the Ray cluster of this machine; RAY_ADDRESS names one of several.
    """
    folder = _join()
    import ray
    from ray.util.state import list_actors

    told = list_actors(filters=[("state", "=", "ALIVE")], limit=MAX_ACTORS)
    actors = [actor for actor in told if actor.class_name.startswith(ACTOR_CLASSES)]
    own_node = ray.get_runtime_context().get_node_id()

    def lines_of(actor: Any) -> Iterator[str]:
        if actor.node_id != own_node:
            return _named(_chunks_of_node(actor, lines, follow), actor)
        # Without Ray's agent, whose port another Ray of this machine may have.
        return _named(_chunks_of_file(folder, actor, lines, follow), actor)

    if not follow:
        dated = [each for actor in actors for each in _dated(lines_of(actor))]
        write("".join(line for _, line in sorted(dated, key=itemgetter(0))))
        return
    arrived: SimpleQueue[str] = SimpleQueue()

    def tail(actor: Any) -> None:
        for line in lines_of(actor):
            arrived.put(line)

    for actor in actors:
        Thread(target=tail, args=(actor,), name="log", daemon=True).start()
    while True:
        write(arrived.get())


def _dated(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each line with its time, or with that of the line before, as a stack's lines have."""
    time_of = ""
    for line in lines:
        time_of = line[: len("2026-01-01 00:00:00")] if line[:4].isdigit() else time_of
        yield time_of, line


def _named(chunks: Iterator[str], actor: Any) -> Iterator[str]:
    """Yield the lines of a process, each with the process's name at its end."""
    from ray.util.state.exception import RayStateApiException

    name, rest = actor.class_name.rpartition(":")[2], ""
    try:
        for chunk in chunks:
            *whole, rest = (rest + chunk).split("\n")
            for line in whole:
                if line and not line.startswith(":"):  # Ray's own marks
                    yield f"{line} ({name}, pid {actor.pid})\n"
    except (OSError, RayStateApiException) as error:  # its node has ended, for one
        sys.stderr.write(f"expertmesh: the log of {name}, pid {actor.pid}, is missing: {error}\n")


def _chunks_of_node(actor: Any, lines: int, follow: bool) -> Iterator[str]:
    """Yield the end of the log of a process on another node, and what comes."""
    from ray.util.state import get_log

    return get_log(
        actor_id=actor.actor_id, suffix="err", tail=lines, follow=follow, timeout=TIMEOUT_S
    )


def _chunks_of_file(folder: Path, actor: Any, lines: int, follow: bool) -> Iterator[str]:
    """Yield the end of the log of a process on this node, and what comes."""
    for file in folder.glob(f"worker-*-{actor.pid}.err"):
        with file.open(encoding="utf-8", errors="replace") as opened:
            yield "".join(deque(opened, lines))
            while follow:
                time.sleep(POLL_S)
                yield opened.read()
