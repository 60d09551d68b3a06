"""Decides whether requests can be served now, and dates the placement behind it: pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.placement.placement import Placement
from cluster.spec import ExpertKey, OnExpertLoss, model_id_of


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of ``/ready`` and ``grpc.health.v1``.

    ``reason`` is empty when ready, else it says why not. ``order`` is the (epoch, version) of the
    known placement. ``loop_age_s`` is the time since the controller last finished a look at an
    actor; it grows while the controller is away. Both are ``None`` before the controller's first
    answer. A deployment that ``is_deleted`` never becomes ready again. ``failed_deploy`` is why the
    last deployment failed, after which the former one serves; or empty.
    """

    reason: str
    order: tuple[int, int] | None
    loop_age_s: float | None
    is_deleted: bool = False
    failed_deploy: str = ""

    @property
    def is_ready(self) -> bool:
        """Whether requests under the deployment's own ``on_expert_loss`` are served now."""
        return not self.reason


def readiness(
    placement: Placement | None,
    models: Iterable[str],
    loop_age_s: float | None,
    on_expert_loss: OnExpertLoss = "strict",
) -> Readiness:
    """Decide whether ``models`` can be served under the newest known placement.

    ``on_expert_loss`` is the deployment's. Requests wait for missing experts under ``strict``, and
    under ``next_expert`` where a whole layer is missing. The deployment is not ready then.
    """
    order = None if placement is None else placement.order
    return Readiness(_reason(placement, models, on_expert_loss), order, loop_age_s)


def model_readiness(
    placement: Placement | None,
    model: str,
    loop_age_s: float | None,
    on_expert_loss: OnExpertLoss = "strict",
) -> Readiness:
    """Decide whether one model, by its id, can be served, whatever others miss."""
    order = None if placement is None else placement.order
    return Readiness(_reason(placement, [model], on_expert_loss, model), order, loop_age_s)


def _reason(
    placement: Placement | None,
    models: Iterable[str],
    on_expert_loss: OnExpertLoss,
    only: str | None = None,
) -> str:
    """Return why ``models`` cannot be served; only the missing experts of ``only`` count."""
    if placement is None:
        return "no placement of the experts is known yet"
    placed = {model_id_of(model) for model in placement.models()}
    unplaced = sorted(set(models) - placed)
    if unplaced:  # a new gateway may start before the controller that knows its models
        return f"no placement of the experts of {', '.join(unplaced)} is known yet"
    awaited = _awaited(placement, on_expert_loss)
    missing = sum(only is None or model_id_of(key.model) == only for key in awaited)
    return f"{missing} experts have no live copy" if missing else ""


def is_its_turn(placement: Placement | None, model: str) -> bool:
    """Return whether a new router of a model, by its key, is to serve now.

    On a redeploy the earlier model's routers go on until the new experts have copies, so that no
    request waits for them.
    """
    if placement is None:
        return False
    is_whole = model in placement.models() - {key.model for key in placement.missing()}
    model_id = model_id_of(model)
    earlier = {key for key in placement.models() if model_id_of(key) == model_id} - {model}
    return is_whole or not earlier


def _awaited(placement: Placement, on_expert_loss: OnExpertLoss) -> list[ExpertKey]:
    """Return the missing experts that requests wait for.

    During a redeploy, a model that has all experts serves for a successor of its id that has not.
    """
    missing = placement.missing()
    whole = placement.models() - {key.model for key in missing}
    served = {model_id_of(model) for model in whole}
    missing = [key for key in missing if model_id_of(key.model) not in served]
    if on_expert_loss == "strict" or not missing:
        return missing
    if on_expert_loss == "drop":
        return []
    living = {key[:2] for key, actors in placement.holders.items() if actors}  # (model, layer)
    return [key for key in missing if key[:2] not in living]
