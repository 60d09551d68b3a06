"""Exit reasons: an actor that ends its own process saves why, for its controller to read.

Ray reports that an actor died, but not why. Ray's key-value store keeps the reason until
the controller asks.
"""

from __future__ import annotations

import logging
import threading

from cluster.ray_private import KeyValueStore
from cluster.spec import app_part

LEAVE_TIMEOUT_S = 0.5
"""How long an actor waits for the store before it ends without saving a reason."""
MAX_CHARACTERS = 500
"""A longer reason is cut off: a device's error may contain a trace of its driver."""

logger = logging.getLogger("expertmesh.actor")


class LastWords:
    """The exit reasons of one application's actors."""

    def __init__(self, app: str, store: KeyValueStore) -> None:
        """``store`` is shared by the application's actors and its controllers."""
        self._prefix = f"{app_part(app)}/last words"
        self._store = store

    def leave(self, actor_id: str, generation: int, words: str) -> None:
        """Save why an actor ends its process.

        Returns within :data:`LEAVE_TIMEOUT_S`, and raises nothing: if the store is away, the
        reason is only in the actor's log.
        """

        def put() -> None:
            try:
                self._store.create(self._key(actor_id, generation), words.encode())
            except Exception:
                logger.exception("%s: its exit reason was not saved", actor_id)

        words = words[:MAX_CHARACTERS]
        putting = threading.Thread(target=put, name="last words", daemon=True)
        putting.start()
        putting.join(LEAVE_TIMEOUT_S)

    def take(self, actor_id: str, generation: int) -> str:
        """Return the exit reason of an actor's generation, empty if it left none.

        Unread reasons of the actor's earlier generations are deleted with it.
        """
        words = self._store.get(self._key(actor_id, generation))
        for key in self._store.keys(self._key(actor_id)):
            self._store.delete(key)
        return "" if words is None else words.decode()

    def _key(self, actor_id: str, generation: int | str = "") -> str:
        return f"{self._prefix}/{actor_id}/{generation}"
