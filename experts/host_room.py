"""Refuses experts for which the host has no memory, before the system would end the actor."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from cluster.errors import NoRoomError
from cluster.memory import memory
from cluster.spec import ExpertKey

LOOK_BYTES = 1 << 28
"""The most bytes of experts between two looks at the host's memory, which others take too."""
FIELD = "args.experts"


class HostMemoryGuard:
    """The host's memory for the experts of one load."""

    def __init__(
        self,
        expert_bytes: Mapping[ExpertKey, int],
        free_bytes: Callable[[], int] = lambda: memory().available_bytes,
    ) -> None:
        """``expert_bytes`` has the experts of the load that are to be in the host's memory."""
        self._expert_bytes = expert_bytes
        self._free_bytes = free_bytes
        self._left_bytes = sum(expert_bytes.values())
        self._taken_bytes = LOOK_BYTES  # the first expert is looked at

    def take(self, key: ExpertKey) -> None:
        """Note that an expert is about to be loaded.

        Raises :class:`NoRoomError` where the host has too little memory for all that are left.
        """
        size = self._expert_bytes.get(key, 0)
        if size and self._taken_bytes + size > LOOK_BYTES:
            self._taken_bytes = 0
            free_bytes = self._free_bytes()
            if self._left_bytes > free_bytes:
                where = f"the memory of {socket.gethostname()}"
                raise NoRoomError(where, self._left_bytes, free_bytes, FIELD)
        self._taken_bytes += size
        self._left_bytes -= size
