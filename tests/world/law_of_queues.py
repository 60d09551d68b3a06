"""The law of queues: none grows beyond its bound, from the gateways to the actors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.transport.stream.server import MAX_KEYS
from router.engine.replica import RouterReplica
from router.gateway.output.inbox import MAX_BUFFERED_EVENTS
from router.messages.token_link import MAX_BUFFERED_BYTES

if TYPE_CHECKING:
    from tests.world.serve_api import Replica
    from tests.world.world import World

MAX_WAITING = 48
"""The choices that a router lets wait; gateways hold more for two routers."""
MAX_HELD = 64
"""The choices that a gateway holds of one model."""
MAX_FRAME_BYTES = 64 << 10
"""The tokens of a step, by which a link may pass its bound."""
MIXTURE_LANES = 2
"""The lanes of a mixture's router, each of which connects to actors as a router does."""
PEERS_A_ROUTER = 4
"""The connections of a router to an actor: one, and those whose end it has not seen yet."""


def look_at_queues(world: World) -> None:
    bounds: list[tuple[str, str, int, int]] = []
    routers = world.serve.deployments["router"].replicas
    for replica in world.serve.deployments["router"].running():
        router: RouterReplica = replica.handle.instance
        name, waiting = replica.process.name, len(router._scheduler.waiting)
        bounds.append((name, "choices", waiting, MAX_WAITING))
        most_bytes = MAX_BUFFERED_BYTES + MAX_FRAME_BYTES
        bounds.append((name, "unsent bytes", unsent_bytes(router), most_bytes))
    for replica in world.serve.deployments["gateway"].running():
        bounds += _of_gateway(replica)
    for handle in world.cluster.actors.values():
        if handle.is_started:
            actor = handle.instance._actor
            streams = actor._streams
            most_peers = PEERS_A_ROUTER * (len(routers) + num_lanes(world))
            bounds += [
                (handle.name, "rows", actor._queue.queued_rows, actor._queue.max_rows),
                (handle.name, "connections", len(streams._peers), most_peers),
                (handle.name, "keys", len(streams._keys._secrets), MAX_KEYS),
            ]
    for name, what, number, most in bounds:
        if number > most:
            world.law.broken("queues are bounded", f"{name}: {number} {what} of {most}")


def num_lanes(world: World) -> int:
    """Return how many more there are that connect to actors: a mixture's routers have lanes."""
    if not world.setting.mixture:
        return 0
    return MIXTURE_LANES * len(world.serve.deployments["mixture"].replicas)


def unsent_bytes(router: RouterReplica) -> int:
    """Return what a router keeps for gateways, sent or not yet linked."""
    links = router._links
    sent = sum(writer.transport.get_write_buffer_size() for writer in links._links.values())
    return sent + sum(map(len, links._unsent.values()))


def _of_gateway(replica: Replica) -> list[tuple[str, str, int, int]]:
    upstream, name = replica.handle.instance.upstream, replica.process.name
    events = [len(inbox._events) for inbox in upstream._inboxes.values()]
    return [
        (name, "choices", sum(upstream._held.values()), MAX_HELD),
        (name, "requests", len(upstream._inboxes), MAX_HELD),
        (name, "routes", len(upstream._link._routes), MAX_HELD),
        (name, "events", max(events, default=0), MAX_BUFFERED_EVENTS),
    ]
