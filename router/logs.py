"""Logging of the product's own processes: a few readable lines, errors always."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(name)s %(message)s"


def setup_logging() -> None:
    """Let the ``expertmesh`` loggers speak on stderr, whatever Serve's own level is."""
    root = logging.getLogger("expertmesh")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
