"""The Serve that runs an application: which of its applications are ours, and its proxies."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from router.serve import instance
from router.serve.instance import our_applications, refuse_proxies


def runs(monkeypatch: pytest.MonkeyPatch, **deployments: list[str]) -> None:
    """A Serve whose applications, by name, have these deployments."""
    applications = {
        name: SimpleNamespace(deployments=dict.fromkeys(names))
        for name, names in deployments.items()
    }
    status = SimpleNamespace(applications=applications)
    monkeypatch.setattr(instance.serve, "status", lambda: status)


def test_applications_are_ours_by_their_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch)
    assert our_applications(10) == []
    ours = ["Controller", "Router-m", "Gateway-12ab34"]
    runs(monkeypatch, a=ours, other=["Gateway", "GatewayOfOthers"], b=[*ours, "Gateway-56cd78"])
    assert our_applications(10) == ["a", "b"]


def test_a_serve_that_fails_or_is_silent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RayActorError

    monkeypatch.setattr(instance.serve, "status", fails)
    with pytest.raises(RayActorError):
        our_applications(10)
    never = threading.Event()
    monkeypatch.setattr(instance.serve, "status", never.wait)
    with pytest.raises(TimeoutError, match="does not answer"):
        our_applications(0.01)
    never.set()


def has_proxies(monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
    """A Serve with a proxy on each of these nodes."""
    status = SimpleNamespace(proxies=dict.fromkeys(nodes, "HEALTHY"))
    monkeypatch.setattr(instance.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(instance.serve, "status", lambda: status)


@pytest.mark.parametrize("nodes", [["a"], ["a", "b"]])
def test_a_serve_with_proxies_is_refused(nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    has_proxies(monkeypatch, *nodes)
    with pytest.raises(RayServeException, match="`proxy_location: Disabled` at the top of") as no:
        refuse_proxies()
    assert "shut Serve down" in str(no.value)


def test_a_serve_without_proxies_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    has_proxies(monkeypatch)
    refuse_proxies()


def test_where_there_is_no_ray_serve_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(instance.serve, "status", lambda: pytest.fail("asked"))
    refuse_proxies()
