"""The end of a world leaves generators and coroutines that nobody goes on with."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say nothing of them."""
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: None)
