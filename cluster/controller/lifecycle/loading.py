"""How far actors are with loading their shares, for status and log.

:mod:`cluster.controller.lifecycle.keeper` asks the actors while they load.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.reports import LoadingStatus, loading_line
from cluster.spec import ActorReport

NOTICE_S = 5.0
"""Time between two log lines; loading that takes less gets none."""


class Loading:
    """The actors that load now."""

    def __init__(self) -> None:
        """Begin without actors."""
        self._actors: dict[str, LoadingStatus] = {}
        self._noticed_at_s = 0.0

    def begin(self, actor_id: str, num_experts: int, now_s: float) -> None:
        """Note that an actor will load ``num_experts`` from now on; it may not have started."""
        if not self._actors:
            self._noticed_at_s = now_s
        self._actors[actor_id] = LoadingStatus(actor_id, 0, num_experts, 0)

    def update(self, report: ActorReport) -> None:
        """Take a report of an actor that loads."""
        before = self._actors.get(report.actor_id)
        if before is not None:
            self._actors[report.actor_id] = replace(
                before, held_experts=len(report.experts), weight_bytes=report.weight_bytes
            )

    def end(self, actor_id: str) -> None:
        """Note that an actor has its share, or has failed to load it."""
        self._actors.pop(actor_id, None)

    def status(self) -> tuple[LoadingStatus, ...]:
        """Return the progress of each actor that loads now."""
        return tuple(actor for _, actor in sorted(self._actors.items()))

    def notice(self, now_s: float) -> str | None:
        """Return a log line if one is due, every :data:`NOTICE_S`."""
        if not self._actors or now_s - self._noticed_at_s < NOTICE_S:
            return None
        self._noticed_at_s = now_s
        return loading_line(self.status())
