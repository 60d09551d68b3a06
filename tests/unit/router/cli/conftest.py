"""A real gRPC server over a scripted upstream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.gateway_fakes import FakeUpstream, grpc_server, says


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream(says(" was the word"))


@pytest.fixture
def address(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server's address, which the environment tells to commands."""
    with grpc_server(upstream) as opened:
        monkeypatch.setenv("EXPERTMESH_ADDRESS", opened)
        yield opened
