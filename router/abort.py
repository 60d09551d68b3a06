"""Ending ``serve run`` when what it was to run is wrong."""

from __future__ import annotations

from typing import NoReturn

from ray.serve.exceptions import RayServeException


def abort_serve_run(message: str) -> NoReturn:
    """Raise."""
    raise RayServeException(message)
