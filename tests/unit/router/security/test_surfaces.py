"""Every HTTP path and gRPC method with no key, a wrong one, one of another role and a right one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2
from starlette.routing import Route

from cluster.errors import ForbiddenError, UnauthenticatedError
from router.client import Client, Sampling
from router.gateway.grpc.methods import ADMIN_SERVICE, INFERENCE_SERVICE
from router.gateway.metrics import Metrics
from router.gateway.predict.v2_grpc import PREDICTION_SERVICE
from router.protos.errors import DETAILS_KEY, is_from_server
from router.security.access import Access
from router.security.keyring import Keyring
from router.security.keys import Role
from router.security.keys_file import add_key
from tests.unit.gateway_fakes import FakeUpstream, Servicer, http_app, says, serve_grpc
from tests.unit.http_calls import COMPLETIONS

WRONG = "em-wrong"
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
ROLES = {
    INFERENCE_SERVICE.full_name: Role.INFERENCE,
    PREDICTION_SERVICE.full_name: Role.INFERENCE,
    ADMIN_SERVICE.full_name: Role.ADMIN,
}
METHODS = [
    (f"/{service.full_name}/{rpc.name}", rpc.server_streaming, ROLES[service.full_name])
    for service in (INFERENCE_SERVICE, PREDICTION_SERVICE, ADMIN_SERVICE)
    for rpc in service.methods
]
OPEN = {"/-/healthz", "/health", "/ready", "/", "/docs"}


class Keys:
    """A key of each role, and the access of their file."""

    def __init__(self, folder: Path) -> None:
        file = folder / "keys.yaml"
        self.of = {role: add_key(file, role, [role]) for role in Role}
        self.access = Access(Keyring(file), Metrics().refused_caller, slow_s=0.0)

    def cases(self, role: Role) -> list[tuple[str | None, int]]:
        """Return each key, or none, and the HTTP status that it gets; 0 is any but a refusal."""
        others = [(self.of[other], 403) for other in Role if other is not role]
        return [(None, 401), (WRONG, 401), *others, (self.of[role], 0)]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def to_http(keys: Keys) -> httpx.AsyncClient:
    app = http_app(FakeUpstream(says(" was")), access=keys.access)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_every_http_path_asks_for_its_role(keys: Keys) -> None:
    app = http_app(FakeUpstream(says(" was")), access=keys.access)
    routes = {
        (method, route.path.replace("{model_id:path}", "tiny").replace("{model}", "digits"))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    } | {("GET", "/nowhere"), ("POST", "/health/"), ("GET", "/x//metrics"), ("GET", "/docs/x")}
    assert len(routes) > 12
    async with to_http(keys) as client:
        for method, path in routes:
            cases = keys.cases(role_of(path))
            statuses = [
                (await client.request(method, path, headers=bearer(key), json={})).status_code
                for key, _ in cases
            ]
            assert statuses[-1] not in (401, 403), (method, path)
            if path in OPEN:
                assert statuses[0] not in (401, 403), (method, path)
                assert statuses[1] == 401  # a wrong key is told so everywhere
                assert all(status not in (401, 403) for status in statuses[2:])
            else:
                assert statuses[:-1] == [status for _, status in cases[:-1]], (method, path)


def role_of(path: str) -> Role:
    return Role.METRICS if path == "/metrics" else Role.INFERENCE


async def test_what_http_tells_with_and_without_a_key(keys: Keys) -> None:
    async with to_http(keys) as client:
        bare = await client.get("/ready")
        assert bare.json() == {"ready": True}
        keyed = await client.get("/ready", headers=bearer(keys.of[Role.METRICS]))
        assert "epoch" in keyed.json()
        # A refusal names the scheme, and is shaped by the API.
        answer = await client.get("/v1/models", headers=bearer(WRONG))
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "unauthenticated")
        assert WRONG not in answer.text
        assert set((await client.get("/v2", headers=bearer(WRONG))).json()) == {"error"}
        body = {"model": "tiny", "prompt": "in", "max_tokens": 4}
        headers = bearer(keys.of[Role.INFERENCE])
        answer = await client.post(COMPLETIONS, json=body, headers=headers)
        assert answer.json()["choices"][0]["text"] == " was"


@pytest.fixture
def channel(keys: Keys) -> Iterator[grpc.Channel]:
    servicer = Servicer(FakeUpstream(says(" was")), access=keys.access)
    with serve_grpc(servicer) as address, grpc.insecure_channel(address) as opened:
        yield opened


def status_of(channel: grpc.Channel, path: str, streams: bool, key: str | None) -> grpc.StatusCode:
    """Return the status of a call with an empty message; a stream's first message is enough."""
    metadata = tuple(bearer(key).items())
    try:
        if streams:
            call = channel.unary_stream(path)(b"", timeout=10, metadata=metadata)
            next(call, None)
            call.cancel()
        else:
            channel.unary_unary(path)(b"", timeout=10, metadata=metadata)
    except grpc.RpcError as refused:
        failed = refused
    else:
        return grpc.StatusCode.OK
    if failed.code() in REFUSED:
        assert is_from_server(dict(failed.trailing_metadata())[DETAILS_KEY])
        assert key is None or key not in failed.details()
    code: grpc.StatusCode = failed.code()
    return code


REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
OF_HTTP = {401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED}


def test_every_grpc_method_asks_for_its_role(keys: Keys, channel: grpc.Channel) -> None:
    assert len(METHODS) > 14
    for path, streams, role in METHODS:
        *refused, right = [status_of(channel, path, streams, key) for key, _ in keys.cases(role)]
        assert refused == [OF_HTTP[status] for _, status in keys.cases(role)[:-1]], path
        assert right not in REFUSED, path


def test_health_is_told_to_everybody_and_watched_with_any_key(
    keys: Keys, channel: grpc.Channel
) -> None:
    check, watch = f"/{HEALTH.full_name}/Check", f"/{HEALTH.full_name}/Watch"
    for key in (None, *keys.of.values()):
        assert status_of(channel, check, False, key) is grpc.StatusCode.OK
    for key in keys.of.values():
        assert status_of(channel, watch, True, key) is grpc.StatusCode.OK
    assert status_of(channel, watch, True, None) is grpc.StatusCode.UNAUTHENTICATED
    assert status_of(channel, check, False, WRONG) is grpc.StatusCode.UNAUTHENTICATED
    call = channel.unary_unary(check)
    _, bare = call.with_call(b"", timeout=10)
    _, keyed = call.with_call(b"", timeout=10, metadata=list(bearer(keys.of[Role.ADMIN]).items()))
    assert not [key for key, _ in bare.trailing_metadata() if key.startswith("expertmesh")]
    assert [key for key, _ in keyed.trailing_metadata() if key.startswith("expertmesh")]


def test_the_client_shows_its_key_and_that_of_the_environment(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer = Servicer(FakeUpstream(says(" was")), access=keys.access)
    sampling = Sampling(max_tokens=4, temperature=0.0)
    with serve_grpc(servicer) as address:

        def client(**options: str) -> Client:
            return Client(address, retry=None, **options)  # type: ignore[arg-type]

        with client() as bare:
            for ask in (bare.generate, lambda *given: list(bare.stream(*given))):
                with pytest.raises(UnauthenticatedError, match="no key was sent"):
                    ask("in", sampling)
        with client(api_key=keys.of[Role.INFERENCE]) as owner:
            assert owner.generate("in", sampling)[0].text == " was"
            assert "".join(piece.text for piece in owner.stream("in", sampling)) == " was"
            with pytest.raises(ForbiddenError, match="needed is admin"):
                owner.status()
        with client(api_key=keys.of[Role.ADMIN]) as admin:
            assert admin.status().models == ("tiny",)
            with pytest.raises(ForbiddenError, match="needed is inference"):
                admin.generate("in", sampling)
        monkeypatch.setenv("EXPERTMESH_API_KEY", keys.of[Role.INFERENCE])
        with client() as one:
            assert one.generate("in", sampling)[0].text == " was"
        with client(api_key="") as nobody, pytest.raises(UnauthenticatedError):
            nobody.generate("in", sampling)
