"""The one check of callers, below HTTP and gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from cluster.errors import ForbiddenError, UnauthenticatedError
from cluster.log_limit import LogLimit
from router.security.keyring import Keyring
from router.security.keys import ANYBODY, Caller, Role

FIELD = "authorization"
"""The header, and the key of gRPC's metadata."""
MAX_KEY_CHARS = 256
SLOW_S = 1.0
"""How long a refusal takes: whoever tries keys learns little in a day."""
MAX_SLOW = 256
"""Refusals that wait at one time; what is beyond is refused at once, since a crowd of strangers
must not fill the memory."""
_WANTED = "a key of this deployment is needed, as `authorization: Bearer KEY`"

logger = logging.getLogger("expertmesh.security")


class Access:
    """Tells who calls, and refuses whoever may not; used on one event loop.

    Without a keyring everybody may do everything.
    """

    def __init__(
        self, keyring: Keyring | None, count: Callable[[str, str], None], slow_s: float = SLOW_S
    ) -> None:
        """``count`` gets the surface (``http``, ``grpc``) and the reason of each refusal."""
        self._keyring = keyring
        self._count = count
        self._slow_s = slow_s
        self._num_slow = 0
        self._log_limit = LogLimit()

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything."""
        return self._keyring is None

    @property
    def problem(self) -> str:
        """Why the file of keys cannot be used as it is now; empty where it can."""
        return "" if self._keyring is None else self._keyring.problem

    async def admit(self, surface: str, given: Sequence[str], role: Role | None) -> Caller:
        """Return the caller of a request that brings these ``authorization`` values.

        ``role`` is needed; without one any key will do. Raises :class:`UnauthenticatedError`, after
        a while, and :class:`ForbiddenError` where the key has other roles.
        """
        if self._keyring is None:
            return ANYBODY
        key = _bearer_key(given)
        caller = self._keyring.caller(key) if key else None
        if caller is None:
            reason = "unknown_key" if given else "no_key"
            self._refused(surface, reason)
            await self._slow_down()
            raise UnauthenticatedError(
                f"{_WANTED}; {'this key is unknown' if given else 'no key was sent'}", FIELD
            )
        if role is not None and role not in caller.roles:
            self._refused(surface, "wrong_role")
            roles = ", ".join(sorted(caller.roles))
            raise ForbiddenError(f"this key is for {roles}, needed is {role}", FIELD)
        return caller

    def _refused(self, surface: str, reason: str) -> None:
        self._count(surface, reason)
        if num_refused := self._log_limit.count():
            logger.warning(
                "%d requests were refused for want of a key or a role (the last: %s, %s)",
                num_refused,
                surface,
                reason,
            )

    async def _slow_down(self) -> None:
        if self._num_slow >= MAX_SLOW:
            return
        self._num_slow += 1
        try:
            await asyncio.sleep(self._slow_s)
        finally:
            self._num_slow -= 1


def _bearer_key(given: Sequence[str]) -> str:
    """Return the key of the only ``authorization`` value; empty where there is no such key."""
    if len(given) != 1:
        return ""
    scheme, _, key = given[0].strip().partition(" ")
    key = key.strip()
    is_key = 0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()
    return key if is_key and scheme.lower() == "bearer" else ""
