"""How far actors are with loading their shares, as the controller sees and says it.

Nothing here asks anybody; :mod:`cluster.controller.controller` does, while it waits for a share to
be loaded.
"""

from __future__ import annotations

from cluster.reports import LoadingStatus
from cluster.spec import ActorReport

NOTICE_S = 5.0
"""Between two lines of the log; what takes less has none."""


class Loading:
    """The actors that load now, and when the log last had a line of them."""

    def __init__(self) -> None:
        """Start with nobody loading."""
        self._actors: dict[str, LoadingStatus] = {}
        self._said_s = 0.0

    def begin(self, actor_id: str, num_experts: int, now_s: float) -> None:
        """Note that an actor is to load so many experts, from now on; it may not have started."""
        if not self._actors:
            self._said_s = now_s
        self._actors[actor_id] = LoadingStatus(actor_id, 0, num_experts, 0)

    def update(self, report: ActorReport) -> None:
        """Take a report of an actor that loads."""
        known = self._actors.get(report.actor_id)
        if known is not None:
            held, weight_bytes = len(report.experts), report.weight_bytes
            self._actors[report.actor_id] = LoadingStatus(
                report.actor_id, held, known.num_experts, weight_bytes
            )

    def end(self, actor_id: str) -> None:
        """Note that an actor loads no more, whether it has its share or not."""
        self._actors.pop(actor_id, None)

    def status(self) -> tuple[LoadingStatus, ...]:
        """Return how far each actor is that loads now."""
        return tuple(one for _, one in sorted(self._actors.items()))

    def notice(self, now_s: float) -> str | None:
        """Return a line for the log where one is due; it counts as said."""
        if not self._actors or now_s - self._said_s < NOTICE_S:
            return None
        self._said_s = now_s
        return loading_line(self.status())


def loading_line(loading: tuple[LoadingStatus, ...]) -> str:
    """Return how far all that load are together, for people."""
    held = sum(one.held_experts for one in loading)
    total = sum(one.num_experts for one in loading)
    size = sum(one.weight_bytes for one in loading) / 1e9
    actors = f"{len(loading)} actor{'s' if len(loading) > 1 else ''}"
    return f"{held} of {total} experts ({held / max(1, total):.0%}, {size:.1f} GB) on {actors}"
