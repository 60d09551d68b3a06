"""Which processor cores an actor's products run on, where cores are few.

A router wakes its actors one right after the other. Where no core is idle at that moment, Linux
likes to put the second actor behind the first on one core, and leaves it there while the router
sleeps and its core idles: a quarter of all layers took twice as long on two cores. So each actor
of a small machine keeps a core of its own. Routers and gateways, which wait while actors compute,
stay free to run where there is room.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

MAX_CORES = 8
"""With more cores one is idle when an actor wakes, and nobody's core need be fixed."""


class CoreClaim:
    """Cores that no other actor of this host has; they are free again when the process ends."""

    def __init__(self, count: int) -> None:
        """Claim ``count`` cores of those that this process may use, or none at all.

        ``cores`` is empty where there are more than ``MAX_CORES`` or fewer than ``count`` left, and
        on systems that cannot bind threads to cores.
        """
        self.cores: frozenset[int] = frozenset()
        self._names: list[socket.socket] = []
        if not hasattr(os, "sched_setaffinity"):
            return
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) > MAX_CORES:
            return
        claimed: dict[int, socket.socket] = {}
        for core in allowed:
            if len(claimed) < count:
                name = _take(core)
                if name is not None:
                    claimed[core] = name
        self._names = list(claimed.values())
        if len(claimed) < count:
            self.close()
        else:
            self.cores = frozenset(claimed)

    def bind_thread(self) -> None:
        """Have the calling thread, and those that it starts later, run on these cores, if any."""
        if self.cores:
            with suppress(OSError):  # a core has been taken from this process meanwhile
                os.sched_setaffinity(0, self.cores)

    def close(self) -> None:
        """Let others claim the cores; threads that were bound stay so."""
        for name in self._names:
            name.close()
        self._names.clear()


def _take(core: int) -> socket.socket | None:
    """Return what holds the claim on a core, or ``None`` when another process has it."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # An abstract name is gone with its process, however that ends.
        name.bind(f"\0expertmesh-core-{core}")
    except OSError:
        name.close()
        return None
    return name
