"""The controller's calls, from a gateway: each has a deadline and raises a typed error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnavailableError
from cluster.reports import Samples
from router.gateway import admin as admin_module
from router.gateway.admin import Admin
from router.gateway.grpc.methods import ADMIN_CALLS, ADMIN_SERVICE
from router.gateway.metrics import Metrics
from tests.unit import gateway_fakes as fakes
from tests.unit.gateway_fakes import FakeController, FakeUpstream, admin, says

CHANGES: dict[str, Callable[[Admin], Coroutine[Any, Any, Any]]] = {
    "rebalance": lambda admin: admin.change("rebalance", True),
    "scale": lambda admin: admin.change("scale", 3, "gpu", False),
    "drain": lambda admin: admin.change("drain", "a0", True),
    "set_copies": lambda admin: admin.change("set_copies", "tiny", 1, 5, 2, False, False),
}
CALLS: dict[str, Callable[[Admin], Coroutine[Any, Any, Any]]] = {
    "status": lambda admin: admin.ask("status"),
    "load": lambda admin: admin.ask("load"),
    **CHANGES,
}
REPORTS = {"status": fakes.STATUS, "load": fakes.LOAD, "rebalance": fakes.REBALANCED}


class SilentController(FakeController):
    async def _answer(self, name: str, *args: object) -> object:
        await asyncio.Event().wait()
        raise AssertionError("nothing sets the event")


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream(says(""))


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_is_a_report(upstream: FakeUpstream, name: str) -> None:
    report = asyncio.run(CALLS[name](admin(upstream, Metrics())))
    assert report == REPORTS.get(name, fakes.CHANGED)
    assert [call[0] for call in upstream.controller.calls] == [name]


@pytest.mark.parametrize("name", CHANGES)
def test_a_refused_change_raises_the_controllers_error(upstream: FakeUpstream, name: str) -> None:
    upstream.controller.refusal = InvalidRequestError("must be from 1 to 4", "actors")
    with pytest.raises(InvalidRequestError, match="must be from 1 to 4") as caught:
        asyncio.run(CHANGES[name](admin(upstream, Metrics())))
    assert caught.value.field == "actors"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("is_silent", [False, True])
def test_without_an_answer_a_call_is_unavailable_in_time(
    upstream: FakeUpstream, name: str, is_silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_module, "STATUS_TIMEOUT_S", 0.05)
    monkeypatch.setattr(admin_module, "CHANGE_TIMEOUT_S", 0.05)
    upstream.controller = SilentController() if is_silent else FakeController()
    upstream.controller.is_away = True
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match="the controller does not answer") as caught:
        asyncio.run(CALLS[name](admin(upstream, Metrics())))
    assert caught.value.retry_after_s == 1.0
    assert time.monotonic() - started_s < 5.0


@pytest.mark.parametrize("is_silent", [None, False, True])
def test_measurements_without_a_controller_are_the_gateways_own(
    upstream: FakeUpstream, is_silent: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_module, "MEASURE_TIMEOUT_S", 0.05)
    if is_silent is not None:
        upstream.controller = SilentController() if is_silent else FakeController()
        upstream.controller.is_away = True
    measurements = asyncio.run(admin(upstream, Metrics()).measurements())
    [own] = measurements.processes
    assert (own.kind, own.process.pid, type(own.samples)) == ("gateway", 43, Samples)
    is_whole = is_silent is None
    assert (measurements.status, measurements.reports) == (
        (fakes.STATUS, (fakes.REPORT,)) if is_whole else (None, ())
    )


def test_every_method_of_the_service_has_a_call() -> None:
    assert list(ADMIN_CALLS) == list(ADMIN_SERVICE.methods_by_name)
