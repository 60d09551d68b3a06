"""``expertmesh stop`` and ``logs``: what runs in a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Annotated, Any

import typer

from router.cli.common import UNREACHABLE, fail, write

ACTOR_CLASSES = ("ServeReplica:", "RemoteExpertActor")
TIMEOUT_S, MAX_ACTORS = 30, 10_000


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


def _join() -> None:
    """Join this machine's Ray cluster, with its token; ends the command where none runs."""
    from router.ops.doctor.running_ray import raylets
    from router.ops.startup.ray_token import send_token

    named = os.environ.get("RAY_ADDRESS", "auto")
    if not raylets():
        fail("nothing runs here: no Ray runs on this machine", UNREACHABLE)
    send_token(None)
    import ray

    try:
        address = "auto" if named == "local" else named
        ray.init(address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        fail(f"the Ray on this machine cannot be joined: {error}", UNREACHABLE)


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
    _join()
    from ray.util.state import list_actors

    told = list_actors(filters=[("state", "=", "ALIVE")], limit=MAX_ACTORS)
    actors = [actor for actor in told if actor.class_name.startswith(ACTOR_CLASSES)]
    if not follow:
        found = [line for actor in actors for line in _lines_of(actor, lines)]
        write("".join(sorted(found)))
        return
    arrived: SimpleQueue[str] = SimpleQueue()

    def tail(actor: Any) -> None:
        for line in _lines_of(actor, lines, follow=True):
            arrived.put(line)

    for actor in actors:
        Thread(target=tail, args=(actor,), name="log", daemon=True).start()
    while True:
        write(arrived.get())


def _lines_of(actor: Any, lines: int, follow: bool = False) -> Iterator[str]:
    """Yield the lines of a process, each with the process's name at its end."""
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    name = actor.class_name.rpartition(":")[2]
    chunks = get_log(
        actor_id=actor.actor_id,
        suffix="err",
        tail=lines,
        follow=follow,
        timeout=TIMEOUT_S,
    )
    rest = ""
    try:
        for chunk in chunks:
            *whole, rest = (rest + chunk).split("\n")
            for line in whole:
                if line and not line.startswith(":"):  # Ray's own marks
                    yield f"{line} ({name}, pid {actor.pid})\n"
    except RayStateApiException as error:  # its node has ended, for one
        yield f"expertmesh: no log of {name}, pid {actor.pid}, can be read: {error}\n"
