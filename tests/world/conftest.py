"""A world's product logs much, and its end leaves generators that nobody goes on with."""

from __future__ import annotations

import logging
import sys

import pytest


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say nothing of either."""
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: None)
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
