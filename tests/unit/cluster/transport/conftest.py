"""Channels with native code, and without."""

from __future__ import annotations

from types import ModuleType

import pytest

from cluster import native as built
from cluster.transport.stream.channel import Channel

IMPLEMENTATIONS = [None] if built.native is None else [built.native, None]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda native: "native" if native else "python")
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType | None:
    """Run a test once with native code, and once without."""
    monkeypatch.setattr(Channel, "_native", request.param)
    chosen: ModuleType | None = request.param
    return chosen
