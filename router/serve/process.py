"""What makes a process start sooner."""

from __future__ import annotations

import gc
import logging
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


FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def setup_logging() -> None:
    """Let the ``expertmesh`` loggers speak on the process's own stderr, whatever Serve's level is.

    Serve may have put a file in the place of ``sys.stderr``; the terminal that ``serve run`` was
    started from sees only what goes to the original one.
    """
    root = logging.getLogger("expertmesh")
    if not root.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False


@contextmanager
def failures_logged(what: str) -> Iterator[None]:
    """Log an exception that Serve would write to a file only, and pass it on."""
    try:
        yield
    except Exception:
        logging.getLogger("expertmesh").exception("%s could not start", what)
        raise
