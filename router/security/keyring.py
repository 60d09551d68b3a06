"""The keys in force: read from their file, and again whenever it changes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from cluster.errors import ConfigError
from router.security.keys import Caller, Callers, Stamp, digest_of, read_callers

LOOK_S = 1.0
"""A key that is added or revoked counts after so long, and the reading of the file."""

logger = logging.getLogger("expertmesh.security")


class Keyring:
    """Tells the owner of a key; used on one event loop, except for the reading.

    ``problem`` says why the file, as it is now, cannot be used, and is empty else: the keys from
    before it went wrong stay in force.
    """

    def __init__(self, file: Path) -> None:
        """Read the keys; raises :class:`ConfigError` where they cannot be."""
        self._file = file
        self._seen: Stamp | None
        self._callers, self._seen = read_callers(file)
        self.problem = ""

    def caller(self, key: str) -> Caller | None:
        """Return the owner of a key, or ``None`` for a key that nobody has."""
        return self._callers.get(digest_of(key))

    async def follow(self) -> None:
        """Read the file whenever it has changed; ends only by a cancellation."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.take(await asyncio.to_thread(self.changed))

    def changed(self) -> Callers | ConfigError | None:
        """Return the keys of a file that has changed since the last call, or why there are none.

        Reads the disk; everything else is for :meth:`take`.
        """
        try:
            stamp = Stamp.of(self._file.stat())
        except OSError:
            stamp = None
        if stamp is not None and stamp == self._seen:
            return None
        try:
            callers, self._seen = read_callers(self._file)
        except ConfigError as error:
            self._seen = stamp
            return error
        return callers

    def take(self, found: Callers | ConfigError | None) -> None:
        """Put changed keys in force, or log why the earlier ones stay."""
        if isinstance(found, ConfigError):
            if str(found) != self.problem:
                logger.error("%s; the keys from before stay in force", found)
            self.problem = str(found)
        elif found is not None:
            self._callers, self.problem = found, ""
            logger.warning("%s: %d keys are in force now", self._file, len(found))
