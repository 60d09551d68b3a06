"""Where an actor's successor is to start."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from cluster.placement.placement import crowding
from cluster.spec import ExpertKey


def node_for_successor(
    actor_id: str,
    candidates: Collection[str],
    avoided: Mapping[str, float],
    shares: Mapping[str, Sequence[ExpertKey]],
    nodes: Mapping[str, str],
    min_copies: int,
    is_own_bad: bool,
) -> str | None:
    """Return the node of an actor's successor; ``None`` leaves the choice to Ray.

    With several copies of each expert, a successor returns to its predecessor's node, so that
    copies stay on different nodes. Where that node is avoided, or nodes are and there is one copy,
    it goes to another of the ``candidates``, which have free resources: to the node whose avoidance
    ends first, then with the fewest other copies of its experts, then with the fewest actors. Where
    all nodes are avoided, it returns too unless its own end says that the node ``is_own_bad``.
    ``avoided`` has the time at which the avoidance of a node ends. ``shares`` has the experts of
    each actor, ``nodes`` its node.
    """
    own, actors = nodes.get(actor_id), list(nodes.values())
    if not avoided or (min_copies > 1 and own is not None and own not in avoided):
        return own if min_copies > 1 else None
    if not is_own_bad and all(node in avoided for node in candidates):
        return own if min_copies > 1 else None  # they would all gather on one bad node
    others = [node for node in candidates if node != own or own not in avoided]
    if not others:
        return own if min_copies > 1 else None
    return min(
        others,
        key=lambda node: (
            avoided.get(node, -math.inf),
            crowding(actor_id, node, shares, nodes),
            actors.count(node),
            node,
        ),
    )
