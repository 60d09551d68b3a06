"""The C library's heap."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Give pages of freed blocks back to the system, if the C library is glibc.

    Others decide themselves. glibc keeps freed blocks below its thresholds
    (:func:`cluster.environment.router_environment`), among them the buffers of a model's loading.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
