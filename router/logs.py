"""Logging of the product's own processes: a few readable lines, errors always."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
