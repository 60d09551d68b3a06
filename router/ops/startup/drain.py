"""Lets the requests under way end before a command shuts down Serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Protocol

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from router.serve.instance import applications
from router.serve.options import CONTROLLER

POLL_S = 0.2
ASK_TIMEOUT_S = 5.0
SILENCE_S = 10.0
"""Gateways that answer nothing for so long are not waited for."""
END_S = 2.0
"""Requests that are ended have left the gateways within this time."""
METHOD = "shut_down"
"""The method of :class:`router.serve.gateway.GatewayReplica` that all gateways are asked."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """The requests that the gateways have not finished, and the longest time (s) they may take."""

    requests: int
    limit_s: float


class Gateways(Protocol):
    """All gateways of a deployment."""

    def shut_down(self, ends_requests: bool) -> UnderWay | None:
        """Have every gateway refuse new requests; returns the requests under way at all of them.

        The gateways end those requests where ``ends_requests``. ``None`` where a gateway does not
        answer.
        """
        ...


def drain(gateways: Gateways, cut: Event, on_begin: Callable[[UnderWay], None]) -> int:
    """Have requests refused until none is under way; returns how many are left.

    Some are left when ``cut`` is set, when the time of the longest request is over, and when
    gateways answer nothing for :data:`SILENCE_S`. ``on_begin`` gets the first answer that has
    requests.
    """
    began_at_s = answered_at_s = time.monotonic()
    last = UnderWay(0, 0.0)
    while not cut.is_set():
        answer, now_s = gateways.shut_down(ends_requests=False), time.monotonic()
        if answer is not None:
            if answer.requests == 0:
                return 0
            if last.requests == 0:
                on_begin(answer)
            last, answered_at_s = answer, now_s
        if now_s - answered_at_s > SILENCE_S or now_s - began_at_s > max(last.limit_s, SILENCE_S):
            break
        cut.wait(POLL_S)
    return last.requests


def end_requests(gateways: Gateways) -> None:
    """Have requests under way end with UNAVAILABLE; returns once none is left, or not in time."""
    until_s = time.monotonic() + END_S
    while time.monotonic() < until_s:
        answer = gateways.shut_down(ends_requests=True)
        if answer is None or answer.requests == 0:
            return
        time.sleep(POLL_S)


class ServedGateways:
    """The gateways of all our applications of the Serve that this process is connected to.

    Serve tells only the deployments of a redeploy, and none once it has failed. So each
    application's controller is asked, which knows every gateway that lives.
    """

    def __init__(self) -> None:
        """Connect to nothing yet."""
        self._handles: dict[tuple[str, str], DeploymentHandle] = {}

    def shut_down(self, ends_requests: bool) -> UnderWay | None:
        """See :class:`Gateways`. Replicas that have started since the last call are asked too."""
        answers: list[UnderWay] = []
        try:
            for app in applications(ASK_TIMEOUT_S):
                for deployment, count in self._deployments(app).items():
                    answers += self._ask(app, deployment, count, ends_requests)
        except (TimeoutError, RayError, _NoAnswerError):
            return None
        return UnderWay(
            sum(answer.requests for answer in answers),
            max((answer.limit_s for answer in answers), default=0.0),
        )

    def _deployments(self, app: str) -> dict[str, int]:
        """Return the gateways' deployments; raises :class:`_NoAnswerError` while none is known."""
        controller = self._handle(CONTROLLER, app)
        if controller is None:  # of a first start, or not ours
            return {}
        try:
            told = controller.gateway_deployments.remote().result(timeout_s=ASK_TIMEOUT_S)
        except RayTaskError:  # not ours
            return {}
        if not told:  # gateways call a new controller within seconds
            raise _NoAnswerError("the controller knows no gateway yet")
        return dict(told)

    def _ask(self, app: str, name: str, count: int, ends_requests: bool) -> list[UnderWay]:
        """Return the answers of a deployment; a gateway that hands over has a request at least."""
        handle, results = self._handle(name, app), []
        if handle is not None:
            with suppress(DeploymentUnavailableError):
                asked = handle.broadcast(METHOD, ends_requests)
                results = asked.results(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
        return _answers(results) + [UnderWay(1, 0.0)] * (count - len(results))

    def _handle(self, deployment: str, app: str) -> DeploymentHandle | None:
        """Return a handle to a deployment, ``None`` where Serve has no such deployment."""
        key = deployment, app
        try:
            if key not in self._handles:
                self._handles[key] = serve.get_deployment_handle(deployment, app)
        except (KeyError, RayServeException):
            return None
        return self._handles[key]


class _NoAnswerError(Exception):
    """A gateway that lives has not answered."""


def _answers(results: Iterable[object]) -> list[UnderWay]:
    """Return the answers of the gateways that live; raises :class:`_NoAnswerError`."""
    answers: list[UnderWay] = []
    for result in results:
        if isinstance(result, RayActorError):  # its requests have ended with it
            continue
        if isinstance(result, Exception):
            raise _NoAnswerError from result
        if not isinstance(result, tuple):
            raise _NoAnswerError(f"an answer of another type: {type(result).__name__}")
        answers.append(UnderWay(*result))
    return answers
