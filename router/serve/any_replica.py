"""How calls of the controller are routed; every process that calls it imports this."""

from __future__ import annotations

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class AnyReplica(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Serve has no types
    """Sends a call to any replica that there is; the controller has one."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return all of them; Serve calls this for a call of a handle."""
        return [candidate_replicas]
