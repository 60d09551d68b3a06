"""The Serve that runs an application: which of its applications are ours, and its proxies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from router.serve import instance
from router.serve.instance import our_applications, refuse_proxies


def runs(monkeypatch: pytest.MonkeyPatch, *import_paths: str) -> None:
    """A Serve whose files have these applications, named by their place."""
    configs = {str(i): SimpleNamespace(import_path=path) for i, path in enumerate(import_paths)}
    controller = SimpleNamespace(get_app_configs=SimpleNamespace(remote=lambda: configs))
    monkeypatch.setattr(instance, "serve_controller", lambda: controller)
    monkeypatch.setattr(instance.ray, "get", lambda answer, timeout: answer)


@pytest.mark.parametrize(
    ("import_paths", "ours"),
    [
        ([], []),
        (["other:app"], []),
        (["router.app:build"], ["0"]),
        (["router.app:build", "other:app", "router.app:build"], ["0", "2"]),
    ],
)
def test_applications_are_ours_by_their_import_path(
    import_paths: list[str], ours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, *import_paths)
    assert our_applications() == ours


def test_without_a_serve_no_application_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Any:
        raise ValueError("no actor has the name")

    monkeypatch.setattr(instance, "serve_controller", nobody)
    assert our_applications() == []


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
