"""The Serve that runs an application: its applications and its proxies."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from router.serve import instance
from router.serve.instance import applications, refuse_proxies


def test_all_applications_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    status = SimpleNamespace(applications={"a": None, "b": None})
    monkeypatch.setattr(instance.serve, "status", lambda: status)
    assert applications(10) == ["a", "b"]


def test_a_serve_that_fails_or_is_silent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RayActorError

    monkeypatch.setattr(instance.serve, "status", fails)
    with pytest.raises(RayActorError):
        applications(10)
    never = threading.Event()
    monkeypatch.setattr(instance.serve, "status", never.wait)
    with pytest.raises(TimeoutError, match="does not answer"):
        applications(0.01)
    never.set()


def test_a_serve_with_proxies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies: dict[str, str] = {}
    monkeypatch.setattr(instance.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(instance.serve, "status", lambda: SimpleNamespace(proxies=proxies))
    refuse_proxies()  # without proxies it is used
    for node in "ab":
        proxies[node] = "HEALTHY"
        with pytest.raises(RayServeException, match="`proxy_location: Disabled` at the top") as no:
            refuse_proxies()
        assert "shut Serve down" in str(no.value)
    monkeypatch.setattr(instance.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(instance.serve, "status", lambda: pytest.fail("asked"))
    refuse_proxies()
