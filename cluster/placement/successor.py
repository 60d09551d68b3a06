"""Where an actor's successor is to start."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from cluster.placement.placement import crowding
from cluster.spec import ExpertKey


def node_for_successor(
    actor_id: str,
    candidates: Collection[str],
    avoided: Collection[str],
    shares: Mapping[str, Sequence[ExpertKey]],
    nodes: Mapping[str, str],
    min_copies: int,
) -> str | None:
    """Return the node of an actor's successor; ``None`` leaves the choice to Ray.

    With several copies of each expert, a successor returns to its predecessor's node, so that
    copies stay on different nodes. Where nodes are ``avoided``, it goes to another of the
    ``candidates``, which have free resources: to the one with the fewest other copies of its
    experts, then with the fewest actors. ``shares`` has the experts of each actor, ``nodes`` its
    node.
    """
    own = nodes.get(actor_id) if min_copies > 1 else None
    if own is not None and own not in avoided:
        return own
    others = [node for node in candidates if node not in avoided] if avoided else []
    if not others:
        return own
    actors = list(nodes.values())
    return min(
        others, key=lambda node: (crowding(actor_id, node, shares, nodes), actors.count(node), node)
    )
