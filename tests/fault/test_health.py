"""Health tells the truth: it falls when an expert has no live copy, and comes back with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.cluster_fixture import TLS, ServedCluster, wait_until
from tests.fault.faults import kill, let_go, stopped

FALLS_S, BACK_S = 60.0, 120.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Both surfaces of one deployment, and what ``Watch`` has told so far."""

    def __init__(self, served: ServedCluster, channel: grpc.Channel) -> None:
        self._url = served.http_url
        self._stub = health_pb2_grpc.HealthStub(channel)
        self._request = health_pb2.HealthCheckRequest()
        self.watched: list[int] = []
        self._watch = self._stub.Watch(self._request, timeout=120)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for reply in self._watch:
                self.watched.append(reply.status)
        except grpc.RpcError:  # cancelled by close
            return

    def close(self) -> None:
        """Stop watching."""
        self._watch.cancel()
        self._reader.join(10)

    def ready(self) -> httpx.Response:
        """Ask ``/ready``."""
        return httpx.get(f"{self._url}/ready", verify=TLS)

    def alive(self) -> bool:
        """Ask ``/health``, which tells of the gateway's own life only."""
        return httpx.get(f"{self._url}/health").status_code == 200

    def tells(self, status: int) -> bool:
        """Return whether ``/ready``, ``Check`` and the newest word of ``Watch`` all say so."""
        http = 200 if status == SERVING else 503
        return (
            self.ready().status_code == http
            and self._stub.Check(self._request, timeout=10).status == status
            and self.watched[-1:] == [status]
        )


@pytest.fixture
def health(served: ServedCluster) -> Iterator[Health]:
    """Give both surfaces while they say that all is well."""
    with grpc.insecure_channel(served.grpc_address) as channel:
        surfaces = Health(served, channel)
        try:
            wait_until(lambda: surfaces.tells(SERVING), "all is well", FALLS_S)
            yield surfaces
        finally:
            surfaces.close()


def test_health_falls_with_the_only_copy_of_an_expert_and_comes_back_with_it(
    served: ServedCluster, health: Health
) -> None:
    told, lost = served.status(), served.actors()["expert-1"]
    before = health.ready().json()
    kill(told, lost.pid)
    wait_until(lambda: health.tells(NOT_SERVING), "health has fallen", FALLS_S)
    refusal = health.ready().json()
    assert refusal["reason"] == f"{len(lost.experts)} experts have no live copy"
    assert refusal["epoch"] == before["epoch"]
    assert refusal["placement_version"] > before["placement_version"]
    assert health.alive()
    wait_until(lambda: health.tells(SERVING), "health is back", BACK_S)
    back = health.ready().json()
    assert back["placement_version"] > refusal["placement_version"]
    assert health.watched == [SERVING, NOT_SERVING, SERVING]
    after = served.wait_whole()
    # Serve restarts nothing because of it.
    assert (after.gateways, after.routers) == (told.gateways, told.routers)


def test_health_falls_with_a_hung_actor(served: ServedCluster, health: Health) -> None:
    told, lost = served.status(), served.actors()["expert-2"]
    with stopped(told, lost.pid):
        wait_until(lambda: health.tells(NOT_SERVING), "health has fallen", FALLS_S)
    wait_until(lambda: health.tells(SERVING), "health is back", BACK_S)
    served.wait_whole()


def test_the_age_of_the_controllers_loop_grows_while_it_hangs(
    served: ServedCluster, health: Health
) -> None:
    def loop_age_s() -> float:
        return float(health.ready().json()["controller_loop_age_s"])

    told = served.status()
    wait_until(lambda: loop_age_s() < 3.0, "the loop is young", FALLS_S)
    with stopped(told, told.controller_pid):
        wait_until(lambda: loop_age_s() > 4.0, "the loop is old", 10)
        assert health.tells(SERVING)  # every expert lives, and requests are served
        assert served.metric("expertmesh_controller_loop_age_seconds").popitem()[1] > 4.0
        let_go(told, told.controller_pid)
        wait_until(lambda: loop_age_s() < 3.0, "the loop is young again", BACK_S)
    served.wait_whole()
