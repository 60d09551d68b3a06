"""Copies of experts apart from each other, when a node joins that could take some of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from cluster.placement.placement import ExpertKey


def crowding(
    actor_id: str,
    node: str,
    shares: Mapping[str, Sequence[ExpertKey]],
    nodes: Mapping[str, str],
) -> int:
    """Return how many copies of an actor's experts others hold on ``node``.

    ``shares`` has what each actor holds, ``nodes`` where each is.
    """
    own = set(shares[actor_id])
    return sum(
        len(own.intersection(share))
        for other, share in shares.items()
        if other != actor_id and nodes.get(other) == node
    )


def node_apart(
    actor_id: str,
    candidates: Collection[str],
    shares: Mapping[str, Sequence[ExpertKey]],
    nodes: Mapping[str, str],
) -> str | None:
    """Return the node where an actor would have fewer of its copies beside it than where it is.

    Of ``candidates``, which have room for it, the one with the fewest; ``None`` where none is
    better.
    """
    here = nodes.get(actor_id)
    if here is None:
        return None
    best = min(sorted(candidates), key=lambda n: crowding(actor_id, n, shares, nodes), default=here)
    is_better = crowding(actor_id, best, shares, nodes) < crowding(actor_id, here, shares, nodes)
    return best if is_better else None
