"""Virtual time and short periods, so that tests of the controller over a fake pool take no time."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from cluster.controller import controller
from cluster.controller.changes import autoscale, elastic, leaving
from cluster.controller.health import deaths, liveness, suspicion
from cluster.controller.lifecycle import keeper
from tests.unit import virtual_time
from tests.unit.cluster.controller.fakes import LIMIT_S


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in virtual time, within a limit; its tasks end with it."""
    if not inspect.iscoroutinefunction(pyfuncitem.function):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def limited() -> None:
        async with asyncio.timeout(2 * LIMIT_S):
            await pyfuncitem.obj(**arguments)

    virtual_time.run(limited())
    return True


@pytest.fixture
def short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "HEARTBEAT_PERIOD_S", 0.01)
    monkeypatch.setattr(controller, "ADOPT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(keeper, "LOOK_S", 0.01)
    monkeypatch.setattr(liveness, "LOOK_S", 0.01)
    monkeypatch.setattr(liveness, "SILENT_S", 0.1)
    monkeypatch.setattr(liveness, "PROBE_S", 0.02)
    monkeypatch.setattr(liveness, "HEARD_MARGIN_S", 0.0)
    monkeypatch.setattr(liveness, "LAST_COPY_S", 5.0)
    monkeypatch.setattr(liveness, "SUSPECTED_S", 0.05)
    monkeypatch.setattr(suspicion, "DOUBT_S", 0.03)
    monkeypatch.setattr(suspicion, "ASK_PERIOD_S", 0.01)
    monkeypatch.setattr(deaths, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(deaths, "MAX_RETRY_S", 0.01)


@pytest.fixture
def quick_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscale, "CHECK_S", 0.01)
    monkeypatch.setattr(autoscale, "DRAINING_CHECK_S", 0.01)
    monkeypatch.setattr(elastic, "SPREAD_RETRY_S", 0.01)
    monkeypatch.setattr(elastic, "UP_TIMEOUT_S", 5.0)
    monkeypatch.setattr(leaving, "SUCCESSOR_TIMEOUT_S", 0.2)
