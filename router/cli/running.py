"""``expertmesh stop`` and ``logs``: the application that runs in this machine's Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Annotated, Any

import typer

from router.cli.common import UNREACHABLE, fail, write

ACTOR_CLASSES = ("ServeReplica:", "RemoteExpertActor")
LOG_TIMEOUT_S = 30


def stop() -> None:
    """End what this machine's Ray cluster serves, once the requests under way are done.

    Example: expertmesh stop

    New requests are refused meanwhile. Ctrl-C ends those under way. `expertmesh serve` ends with
    it; a cluster that `ray start` made goes on.
    """
    _join()
    from ray import serve

    from router.ops.startup.drain import ServedGateways, drain, end_requests

    gateways, cut = ServedGateways(), Event()
    try:
        left = drain(gateways, cut, lambda begun: write(f"waiting for {begun.requests} requests\n"))
    except KeyboardInterrupt:
        left = 1
    if left:
        end_requests(gateways)
    serve.shutdown()
    write("expertmesh: nothing is served any more\n")


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="The last lines of each process.")
    ] = 100,
) -> None:
    """Show the log lines of all processes of ExpertMesh, on all nodes of the cluster.

    Example: expertmesh logs -f
    """
    _join()
    from ray.util import state

    actors = [
        actor
        for actor in state.list_actors(filters=[("state", "=", "ALIVE")], limit=10_000)
        if actor.class_name.startswith(ACTOR_CLASSES)
    ]
    if follow:
        arrived: SimpleQueue[str] = SimpleQueue()
        for actor in actors:
            Thread(target=_follow, args=(actor, lines, arrived), daemon=True).start()
        while True:
            write(arrived.get())
    told = [line for actor in actors for line in _lines_of(actor, lines)]
    write("".join(sorted(told)))


def _follow(actor: Any, lines: int, arrived: SimpleQueue[str]) -> None:
    for line in _lines_of(actor, lines, follow=True):
        arrived.put(line)


def _lines_of(actor: Any, lines: int, follow: bool = False) -> Iterator[str]:
    """Yield the lines of a process, each with the process's name after its time."""
    from ray.util import state

    name = actor.class_name.rpartition(":")[2]
    chunks = state.get_log(
        actor_id=actor.actor_id, suffix="err", tail=lines, follow=follow, timeout=LOG_TIMEOUT_S
    )
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        for line in whole:
            if line and not line.startswith(":"):  # Ray's own marks
                yield f"{line} ({name}, pid {actor.pid})\n"


def _join() -> None:
    """Join this machine's Ray cluster, with its token; fails where none runs."""
    from router.ops.doctor.running_ray import raylets, user_has_token
    from router.ops.startup.ray_token import token_variable

    if not raylets():
        fail("nothing runs here: no Ray runs on this machine", UNREACHABLE)
    if user_has_token(os.environ):
        os.environ.update(token_variable())
    import ray

    try:
        ray.init("auto", namespace="serve", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        fail(f"the Ray on this machine cannot be joined: {error}", UNREACHABLE)
