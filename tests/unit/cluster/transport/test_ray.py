"""Outcomes of Ray calls to expert actors, by the errors of a Ray that is faked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RaySystemError

from cluster.transport import ray as transport_module
from cluster.transport.base import Call, CallFailure
from cluster.transport.ray import RayActors, RayTransport
from cluster.transport.stream.handshake import Network


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ActorDiedError(), CallFailure.DIED),
        (ActorUnavailableError("it is cut off", None), CallFailure.UNREACHABLE),
    ],
)
def test_an_actor_that_cannot_be_reached_is_not_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch, error: RayError, outcome: CallFailure
) -> None:
    def get(refs: object, timeout: float) -> Any:
        raise error

    class Actors:
        def handle(self, actor_id: str, generation: int) -> Any:
            remote = SimpleNamespace(remote=lambda *_: object())
            return SimpleNamespace(dispatch=remote, compute=remote)

        def forget(self, actor_id: str) -> None:
            assert outcome is CallFailure.DIED

    monkeypatch.setattr(transport_module, "ray", SimpleNamespace(get=get))
    transport = RayTransport(Actors())  # type: ignore[arg-type]
    calls = [Call("expert-0", 1, [b"frame"], 1.0)]
    assert transport.send(calls).wait() == [outcome]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("no actor of this name"), CallFailure.DIED),
        (RaySystemError("the control store is away"), CallFailure.UNREACHABLE),
    ],
)
def test_only_an_actor_that_ray_does_not_know_is_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: CallFailure
) -> None:
    known = SimpleNamespace(compute=SimpleNamespace(remote=lambda frame: frame))

    def get_actor(name: str, namespace: str) -> Any:
        if "expert-0" in name:
            raise error
        return known

    fake = SimpleNamespace(get_actor=get_actor, get=lambda refs, timeout: refs)
    monkeypatch.setattr(transport_module, "ray", fake)
    actors = RayActors("app")
    calls = [Call(f"expert-{i}", 1, [b"frame"], 1.0) for i in (1, 0, 2)]
    assert RayTransport(actors).send(calls).wait() == [b"frame", outcome, b"frame"]
    assert actors.offer("expert-0", 1, Network.TCP, 1.0) is None
