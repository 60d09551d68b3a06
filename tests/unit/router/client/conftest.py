"""Tests here may be coroutines; most ask both clients, some of a small served checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router.client import Client, wire
from router.engine.scheduling.scheduler import Limits
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway
from tests.unit.blocking_client import BlockingAsyncClient
from tests.unit.coroutines import pytest_pyfunc_call, runner
from tests.unit.router.client.broken import Connect

__all__ = ["pytest_pyfunc_call", "runner"]


@pytest.fixture(autouse=True)
def _calls_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LOST_S", 0.05)


@pytest.fixture(params=[Client, BlockingAsyncClient])
def connect(request: pytest.FixtureRequest) -> Connect:
    chosen: Connect = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path)
    return path


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(folder, limits=Limits(4, 8, 16), identity="one")
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def gateway(folder: Path, cluster: LocalCluster) -> LocalGateway:
    return LocalGateway(folder, cluster)
