"""The event loops that links run on: asyncio's own, and that of Ray's workers."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from tests.unit.router.messages import handshakes


@pytest.fixture(params=[asyncio, uvloop], ids=lambda loops: loops.__name__)
def both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on each of them."""
    monkeypatch.setattr(handshakes, "new_loop", request.param.new_event_loop)
