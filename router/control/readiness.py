"""Whether requests can be served now, and how old the knowledge is that this goes by: pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.placement.placement import Placement
from cluster.spec import ExpertKey, OnExpertLoss


@dataclass(frozen=True, slots=True)
class Readiness:
    """What ``/ready`` and ``grpc.health.v1`` tell.

    ``reason`` says why not, and is empty when ready. ``order`` is the (epoch, version) of the
    placement that this goes by, and ``loop_age_s`` how long ago the controller last finished a
    look at an actor, which grows while the controller is away; both ``None`` before the first word
    from it. When the deployment ``is_deleted``, it never becomes ready again.
    """

    reason: str
    order: tuple[int, int] | None
    loop_age_s: float | None
    is_deleted: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether requests that ask for nothing else go on now."""
        return not self.reason


def readiness(
    placement: Placement | None,
    models: Iterable[str],
    loop_age_s: float | None,
    on_expert_loss: OnExpertLoss = "strict",
) -> Readiness:
    """Decide whether the served ``models`` can be served under the newest known placement.

    ``on_expert_loss`` is the deployment's. Requests wait for an expert without a live copy under
    ``strict``, and under ``next_expert`` where a whole layer has none; then this is not ready.
    """
    order = None if placement is None else placement.order
    return Readiness(_reason(placement, models, on_expert_loss), order, loop_age_s)


def _reason(
    placement: Placement | None, models: Iterable[str], on_expert_loss: OnExpertLoss
) -> str:
    if placement is None:
        return "no placement of the experts is known yet"
    placed = {key.model for key in placement.holders}
    unplaced = sorted(set(models) - placed)
    if unplaced:  # a new gateway may be there before the controller that knows its models
        return f"no placement of the experts of {', '.join(unplaced)} is known yet"
    missing = len(_awaited(placement, on_expert_loss))
    return f"{missing} experts have no live copy" if missing else ""


def _awaited(placement: Placement, on_expert_loss: OnExpertLoss) -> list[ExpertKey]:
    """Return the experts without a live copy that keep requests waiting."""
    missing = placement.missing()
    if on_expert_loss == "strict" or not missing:
        return missing
    if on_expert_loss == "drop":
        return []
    living = {key[:2] for key, actors in placement.holders.items() if actors}  # (model, layer)
    return [key for key in missing if key[:2] not in living]
