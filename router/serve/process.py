"""What makes a process start sooner."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from running while large libraries are imported.

    They make hundreds of thousands of objects that all stay, and the collector looks at them again
    and again: a fifth of the time that torch and transformers take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Keep torch from being imported, in a process that needs none of it.

    transformers imports it where it finds it, though tokenizers do without: two seconds of a
    gateway's start, and 200 MB of each gateway. What transformers finds at its own first import
    stays, so this is for a process that computes nothing. Where torch is there already, it stays.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # import and find_spec see no torch
    try:
        yield
    finally:
        del sys.modules["torch"]
