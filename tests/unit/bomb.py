"""A pickle that leaves a trace where it is opened."""

from __future__ import annotations

import pickle
from typing import Any

EXECUTED: list[str] = []


def execute(what: str) -> None:
    EXECUTED.append(what)


class Bomb:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return execute, ("ran",)


def pickled_bomb() -> bytes:
    """Return a pickle of which a first opening has shown that it works."""
    pickled = pickle.dumps(Bomb())
    pickle.loads(pickled)
    assert EXECUTED == ["ran"]
    EXECUTED.clear()
    return pickled
