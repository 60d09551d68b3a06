"""Which gateways a command drains: all that the controllers of Serve's applications know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from router.ops.startup import drain as module
from router.ops.startup.drain import ServedGateways, UnderWay
from router.serve import instance
from router.serve.instance import serve_has_ended

NOT_OURS = RayTaskError("gateway_deployments", "", AttributeError())


class Controller:
    """The handle of a controller that knows these gateways by deployment, or fails."""

    def __init__(self, told: dict[str, int] | Exception) -> None:
        self._told = told
        self.gateway_deployments = SimpleNamespace(remote=lambda: self)

    def result(self, timeout_s: float) -> dict[str, int]:
        assert timeout_s > 0
        if isinstance(self._told, Exception):
            raise self._told
        return self._told


class Gateway:
    """The handle of a gateway's deployment, whose replicas answer so."""

    def __init__(self, outcome: list[object] | Exception) -> None:
        self.outcome = outcome

    def broadcast(self, *asked: Any) -> Gateway:
        assert asked == ("shut_down", True)
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert timeout_s > 0
        assert return_exceptions
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def answer_of(
    monkeypatch: pytest.MonkeyPatch, **apps: dict[str, Controller | Gateway]
) -> UnderWay | None:
    """Ask the gateways of applications that have these deployments."""

    def handle(deployment: str, app: str) -> Controller | Gateway:
        if deployment not in apps[app]:
            raise KeyError(f"{deployment} does not exist")
        return apps[app][deployment]

    monkeypatch.setattr(module, "applications", lambda timeout_s: list(apps))
    monkeypatch.setattr(module.serve, "get_deployment_handle", handle)
    return ServedGateways().shut_down(ends_requests=True)


def test_every_gateway_of_every_application_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    a = {"Controller": Controller({"Gateway-1": 2}), "Gateway-1": Gateway([(1, 60.0), (2, 60.0)])}
    b = {"Controller": Controller({"Gateway-9": 1}), "Gateway-9": Gateway([(4, 9.0)])}
    assert answer_of(monkeypatch, a=a, b=b) == UnderWay(7, 60.0)
    assert answer_of(monkeypatch) == UnderWay(0, 0.0)


def test_a_gateway_of_a_former_deployment_has_a_request_while_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller({"Gateway-old": 2, "Gateway-new": 1})
    app = {"Controller": controller, "Gateway-new": Gateway([(0, 60.0)])}
    assert answer_of(monkeypatch, a=app) == UnderWay(2, 60.0)
    unavailable = {**app, "Gateway-old": Gateway(DeploymentUnavailableError("a"))}
    assert answer_of(monkeypatch, a=unavailable) == UnderWay(2, 60.0)


@pytest.mark.parametrize("deployments", [{}, {"Controller": Controller(NOT_OURS)}])
def test_an_application_that_is_not_ours_or_has_not_started_has_no_requests(
    deployments: dict[str, Controller | Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer_of(monkeypatch, a=deployments) == UnderWay(0, 0.0)


@pytest.mark.parametrize("told", [{}, RayActorError(), TimeoutError()])
def test_a_controller_that_knows_no_gateway_or_is_silent_is_no_answer(
    told: dict[str, int] | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer_of(monkeypatch, a={"Controller": Controller(told)}) is None


def test_a_dead_gateway_has_no_requests_and_a_silent_one_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def outcome(results: list[object] | Exception) -> UnderWay | None:
        app = {"Controller": Controller({"Gateway-1": 2}), "Gateway-1": Gateway(results)}
        return answer_of(monkeypatch, a=app)

    assert outcome([RayActorError(), (1, 9.0)]) == UnderWay(1, 9.0)
    assert outcome([TimeoutError(), (1, 9.0)]) is None
    assert outcome(TimeoutError()) is None


def test_a_serve_that_does_not_answer_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(timeout_s: float) -> list[str]:
        raise TimeoutError

    monkeypatch.setattr(module, "applications", silent)
    assert ServedGateways().shut_down(ends_requests=False) is None


@pytest.mark.parametrize(
    ("outcome", "has_ended"),
    [
        (None, False),
        (ActorDiedError(), True),
        (RayActorError(), False),
        (RayServeException(), False),
    ],
)
def test_serve_has_ended_only_once_its_controller_is_dead(
    outcome: Exception | None, has_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(app: str) -> None:
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(instance, "app_status", asked)
    assert serve_has_ended() is has_ended
