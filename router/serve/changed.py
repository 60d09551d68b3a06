"""What tells that Ray Serve is another version than the one whose functions are replaced here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ray

LOOPBACK = "127.0.0.1"
"""HAProxy calls the gateways of its own machine here."""


class ServeChangedError(RuntimeError):
    """This version of Ray Serve listens in another way than the one that is known here."""


def changed(found: str) -> ServeChangedError:
    """Return the error that says what was found."""
    return ServeChangedError(f"Ray {ray.__version__}: {found}; Ray 2.60 is known")


def known(holder: ModuleType | type, name: str) -> Any:
    """Return an attribute of Serve's; raises :class:`ServeChangedError` where there is none."""
    if not hasattr(holder, name):
        raise changed(f"{holder.__name__} has no {name}")
    return getattr(holder, name)
