"""Every port of a deployment with keys and TLS, every method, every caller: the rule holds.

``EXPERTMESH_ANSWERED=FILE`` writes what was found, as the table of ``docs/security.md`` has it.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.generated import serve_pb2
from starlette.routing import Route

from benchmarks.shipped import free_ports
from cluster.tls import shake_hands
from router.client import ClientTls
from router.client.tls import AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE
from router.gateway.grpc.methods import ADMIN_SERVICE, INFERENCE_SERVICE
from router.gateway.http_io import HEALTH_PATH
from router.gateway.predict.v2_grpc import PREDICTION_SERVICE
from router.protos import inference_pb2
from router.protos.errors import DETAILS_KEY, is_from_server
from router.security.keys import Role
from tests import answered
from tests.answered import CERTIFICATES, ROLES, Group, Outcome, Port, State
from tests.client_tls import Pair
from tests.cluster_fixture import TINY, wait_until
from tests.long.test_client_tls import HOST, deployment, is_announced, is_own
from tests.long.test_keys import Keys, bearer, listeners
from tests.serve_run import READY_S, serve_run
from tests.unit.gateway_fakes import FakeUpstream, http_app, says

VARIABLE = "EXPERTMESH_ANSWERED"
ASK_S, THREADS = 10.0, 24
WRONG = "em-canary"
COUNTED = ("expertmesh_requests", "expertmesh_prompt_tokens", "expertmesh_generation_tokens")
"""Counters of calls that were taken to a model, and of what was computed."""
HEALTH, SERVE, REFLECTION = (
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    serve_pb2.DESCRIPTOR.services_by_name["RayServeAPIService"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
GROUPS = {
    INFERENCE_SERVICE.full_name: Group.INFERENCE,
    PREDICTION_SERVICE.full_name: Group.INFERENCE,
    ADMIN_SERVICE.full_name: Group.ADMIN,
    REFLECTION.full_name: Group.REFLECTION,
    f"{HEALTH.full_name}/Check": Group.CHECK,
    f"{HEALTH.full_name}/Watch": Group.WATCH,
    SERVE.full_name: Group.NO_METHOD,
}
SAMPLING = {"max_tokens": 1, "temperature": 0.0}
BODY = {"model": TINY, "prompt": "In the", **SAMPLING}
BODY["messages"] = [{"role": "user", "content": "In the"}]
NOWHERE = (("GET", "/nowhere"), ("POST", "/v3/"), ("GET", "/docs/x"), ("GET", "/-/routes"))
"""Serve's proxies would answer the last one."""


@dataclass(frozen=True)
class Call:
    """A method or a path, and a request that is as good as it can be without a model of its own."""

    group: Group
    path: str
    data: bytes = b""
    verb: str = ""
    """That of HTTP; empty for gRPC."""
    streams: bool = False


def grpc_calls() -> Iterator[Call]:
    """Return a call of every method there is, by the descriptors of the services."""
    for service in (
        INFERENCE_SERVICE,
        PREDICTION_SERVICE,
        ADMIN_SERVICE,
        HEALTH,
        REFLECTION,
        SERVE,
    ):
        for rpc in service.methods:
            name = f"{service.full_name}/{rpc.name}"
            group = GROUPS.get(name) or GROUPS[service.full_name]
            request: Any = GetMessageClass(rpc.input_type)()
            if rpc.input_type.full_name == inference_pb2.GenerateRequest.DESCRIPTOR.full_name:
                request = inference_pb2.GenerateRequest(
                    model=TINY, prompt="In the", sampling=SAMPLING
                )
            if "dry_run" in rpc.input_type.fields_by_name:
                request.dry_run = True
            yield Call(group, f"/{name}", request.SerializeToString(), "", rpc.server_streaming)


def http_calls() -> Iterator[Call]:
    """Return a call of every route there is, by the app's own table, and of some more paths."""
    routes = {
        (verb, route.path.replace("{model_id:path}", TINY).replace("{path:path}", TINY))
        for route in http_app(FakeUpstream(says(""))).routes
        if isinstance(route, Route)
        for verb in route.methods or ()
    }
    assert len(routes) > 12
    groups = {
        "/metrics": Group.METRICS,
        **dict.fromkeys(("/health", "/ready", "/", "/docs"), Group.PROBES),
        HEALTH_PATH: Group.LISTENS,
    }
    for verb, path in sorted(routes):
        assert "{" not in path
        yield Call(groups.get(path, Group.PATHS), path, b"", verb)
    yield from (Call(Group.NOWHERE, path, b"", verb) for verb, path in NOWHERE)


@dataclass
class Shown:
    """What clients have to show: keys, and certificates by the state that they are for."""

    keys: Keys
    tls: Mapping[State, ClientTls]

    def keys_for(self, group: Group, state: State) -> list[str | None]:
        """Return the keys that a state stands for; there are several other roles."""
        role = ROLES.get(group)
        if state is State.NO_KEY:
            return [None]
        if state is State.BAD_KEY:
            return [WRONG]
        if state is State.WRONG_ROLE:
            return [key for other, key in self.keys.of.items() if other is not role]
        return [self.keys.of[role or Role.INFERENCE]]


def shown_by(folder: Path, pair: Pair, keys: Keys) -> Shown:
    """Make the certificates: an expired one of the right authority, a good one of another."""
    stranger = Pair(folder / "stranger")
    ended = datetime.now(UTC) - timedelta(days=1)
    expired = pair.ca.issue_cert("client.example", not_after=ended)
    paths = str(folder / "expired.pem"), str(folder / "expired-key.pem")
    expired.cert_chain_pems[0].write_to_path(paths[0])
    expired.private_key_pem.write_to_path(paths[1])
    tls = dict.fromkeys(State, pair.tls(has_certificate=pair.asks_clients))
    tls[State.NO_CERTIFICATE] = pair.tls(has_certificate=False)
    tls[State.EXPIRED] = ClientTls(pair.authority, *paths)
    tls[State.STRANGER] = ClientTls(pair.authority, stranger.client, stranger.client_key)
    return Shown(keys, tls)


@dataclass
class Walk:
    """Asks ports; keeps connections of each port and certificate."""

    shown: Shown
    stack: ExitStack
    _channels: dict[tuple[int, ClientTls | None], grpc.Channel] = field(default_factory=dict)
    _clients: dict[tuple[int, ClientTls | None], httpx.Client] = field(default_factory=dict)

    def connect(self, ports: Iterable[int]) -> None:
        """Make the clients of some ports."""
        for port in ports:
            for tls in {None, *self.shown.tls.values()}:
                self._channels[port, tls] = self.stack.enter_context(_channel(port, tls))
                self._clients[port, tls] = self.stack.enter_context(_client(port, tls))

    def channel(self, port: int) -> grpc.Channel:
        """Return the connection in plain text to a port."""
        return self._channels[port, None]

    def outcomes(self, port: int, has_tls: bool, call: Call, state: State) -> set[Outcome]:
        """Return what became of a call for each key that a state stands for."""
        tls = self.shown.tls[state] if has_tls and state is not State.PLAIN else None
        keys = self.shown.keys_for(call.group, state)
        if call.verb:
            return {_of_http(self._clients[port, tls], call, key) for key in keys}
        return {_of_grpc(self._channels[port, tls], call, key) for key in keys}


def _channel(port: int, tls: ClientTls | None) -> grpc.Channel:
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    if tls is None:
        return grpc.insecure_channel(f"{HOST}:{port}", options)
    return grpc.secure_channel(f"{HOST}:{port}", tls.credentials(), options)


def _client(port: int, tls: ClientTls | None) -> httpx.Client:
    if tls is None:
        return httpx.Client(base_url=f"http://{HOST}:{port}", timeout=ASK_S, trust_env=False)
    context = ssl.create_default_context(cafile=tls.authority)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    base = f"https://{HOST}:{port}"
    return httpx.Client(base_url=base, timeout=ASK_S, verify=context, trust_env=False)


def _of_http(client: httpx.Client, call: Call, key: str | None) -> Outcome:
    try:
        body = BODY if call.verb == "POST" else None
        answer = client.request(call.verb, call.path, headers=bearer(key), json=body)
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        return Outcome.CLOSED
    status = answer.status_code
    if status in (401, 403):
        assert answer.content or call.verb == "HEAD"
        return Outcome.NO_KEY if status == 401 else Outcome.FORBIDDEN
    if status in (200, 400, 405):  # what only an admitted call is told
        return Outcome.ANSWERED
    return Outcome.ABSENT if status == 404 else Outcome.NOTHING


OF_CODES = {
    grpc.StatusCode.UNAUTHENTICATED: Outcome.NO_KEY,
    grpc.StatusCode.PERMISSION_DENIED: Outcome.FORBIDDEN,
}
ADMITTED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def _of_grpc(channel: grpc.Channel, call: Call, key: str | None) -> Outcome:
    metadata = tuple(bearer(key).items())
    try:
        if call.streams:
            stream = channel.unary_stream(call.path)(call.data, timeout=ASK_S, metadata=metadata)
            next(stream)
            stream.cancel()
        else:
            channel.unary_unary(call.path)(call.data, timeout=ASK_S, metadata=metadata)
    except grpc.RpcError as error:
        return _of_status(error)
    return Outcome.ANSWERED


def _of_status(error: Any) -> Outcome:
    code = error.code()
    trailing = dict(error.trailing_metadata() or ())
    if is_from_server(trailing.get(DETAILS_KEY)):
        return Outcome.ANSWERED if code in ADMITTED else OF_CODES.get(code, Outcome.NOTHING)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Outcome.ABSENT
    return Outcome.CLOSED if code is grpc.StatusCode.UNAVAILABLE else Outcome.NOTHING


def kinds_of(ports: Mapping[int, set[str]], own: Mapping[int, Port], walk: Walk) -> dict[int, Port]:
    """Return the kind of each port: the gateway's ``own``, Ray's, and others."""
    left = [port for port in ports if port not in own]

    def kind(port: int) -> Port:
        return answered.RAY if is_of_ray(walk, port) else answered.OTHERS

    with ThreadPoolExecutor(THREADS) as pool:
        return {**own, **dict(zip(left, pool.map(kind, left), strict=True))}


def is_of_ray(walk: Walk, port: int) -> bool:
    """Return whether a port describes services; they are none but Ray's."""
    path = f"/{REFLECTION.full_name}/{REFLECTION.methods[0].name}"
    request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    try:
        call = walk.channel(port).unary_stream(path)(request, timeout=ASK_S)
        answer = reflection_pb2.ServerReflectionResponse.FromString(next(call))
        call.cancel()
    except grpc.RpcError:
        return False
    names = [one.name for one in answer.list_services_response.service]
    assert names
    assert all(name.startswith(("ray.rpc.", "grpc.")) for name in names), names
    return True


def calls_to(port: Port) -> list[tuple[Group, Call]]:
    """Return what a port is asked, with the row that each call belongs to."""
    http, rpcs = list(http_calls()), list(grpc_calls())
    if port in (answered.RAY, answered.OTHERS):
        return [
            (call.group if call.group in port.groups else Group.ALL, call)
            for call in (*http, *rpcs)
        ]
    own, other = (http, rpcs) if port.is_http else (rpcs, http)
    return [(call.group, call) for call in own] + [(Group.OTHER_PROTOCOL, call) for call in other]


Found = dict[tuple[Port, Group], dict[State, dict[Outcome, str]]]
"""The outcomes of each cell, with a call that had each."""


def asked(
    kinds: Mapping[int, Port], walk: Walk, asks_clients: bool, states: Iterable[State]
) -> Found:
    """Ask every port everything, as callers of some states."""
    found: Found = {}
    tasks: list[tuple[Port, Group, State, str, Callable[[], set[Outcome]]]] = []
    for number, port in kinds.items():
        for group, call in calls_to(port):
            for state in states:
                is_vain = state in CERTIFICATES and not (port.has_tls and asks_clients)
                ask: Callable[[], set[Outcome]] = (
                    (lambda: {Outcome.NOT_APPLICABLE})
                    if is_vain
                    else partial(walk.outcomes, number, port.has_tls, call, state)
                )
                tasks.append((port, group, state, f"{call.verb} {call.path}", ask))
    with ThreadPoolExecutor(THREADS) as pool:
        for (port, group, state, name, _), outcomes in zip(
            tasks, pool.map(lambda task: task[-1](), tasks), strict=True
        ):
            if group in (Group.ALL, Group.OTHER_PROTOCOL):
                outcomes = {_nothing(one, port, state) for one in outcomes}
            cell = found.setdefault((port, group), {}).setdefault(state, {})
            cell.update(dict.fromkeys(outcomes, name))
    return found


def _nothing(outcome: Outcome, port: Port, state: State) -> Outcome:
    """Return the outcome where only whether there is an answer counts."""
    if outcome in (Outcome.ANSWERED, Outcome.NOT_APPLICABLE):
        return outcome
    needs_tls = port.has_tls and (state in CERTIFICATES or state is State.PLAIN)
    return Outcome.CLOSED if needs_tls and outcome is Outcome.CLOSED else Outcome.NOTHING


def counts(walk: Walk, http: int) -> dict[str, float]:
    """Return the sums of what was computed, and of the refused callers."""
    tls = walk.shown.tls[State.RIGHT]
    headers = bearer(walk.shown.keys.of[Role.METRICS])
    text = walk._clients[http, tls].get("/metrics", headers=headers).text
    return {
        family.name: sum(one.value for one in family.samples if one.name.endswith("_total"))
        for family in text_string_to_metric_families(text)
        if family.name in (*COUNTED, "expertmesh_refused_callers")
    }


@pytest.mark.timeout(420)
@pytest.mark.parametrize("asks_clients", [True, False])
def test_every_port_answers_as_the_rule_says(tmp_path: Path, asks_clients: bool) -> None:
    pair, keys = Pair(tmp_path / "tls", asks_clients), Keys(tmp_path)
    http, grpc_port, probe = free_ports(3)
    file, log = deployment(tmp_path, pair, http, grpc_port), tmp_path / "log"
    document = yaml.safe_load(file.read_text())
    args = document["applications"][0]["args"]
    args["security"] = {"keys_file": str(keys.file)}
    args["gateway"]["listen"]["health_port"] = probe
    file.write_text(yaml.safe_dump(document))
    own = {
        http: answered.HTTP,
        grpc_port: answered.GRPC,
        grpc_port + 1: answered.OPERATORS,
        probe: answered.PROBE,
    }
    variables = {CERTIFICATE_VARIABLE: pair.client, KEY_VARIABLE: pair.client_key}
    variables[AUTHORITY_VARIABLE] = pair.authority
    with serve_run(file, log, **variables) as process, ExitStack() as stack:
        wait_until(lambda: is_announced(process, log), "serve run is ready", READY_S)
        walk = Walk(shown_by(tmp_path, pair, keys), stack)
        ports = listeners(process)
        assert own.keys() <= ports.keys()
        assert all(map(is_own, ports[probe]))
        walk.connect(ports)
        kinds = kinds_of(ports, own, walk)
        assert set(kinds.values()) == {*answered.PORTS}
        found = refused_before_anything_is_computed(kinds, walk, asks_clients, http)
        for row, outcomes in asked(kinds, walk, asks_clients, [State.RIGHT, State.PLAIN]).items():
            found[row] |= outcomes
        tls_ports = [number for number, port in kinds.items() if port.has_tls]
        assert len(tls_ports) == 3
        for number in tls_ports:
            speaks_no_old_tls(number, pair)
    assert_is(found, answered.rule(asks_clients=asks_clients))


def refused_before_anything_is_computed(
    kinds: Mapping[int, Port], walk: Walk, asks_clients: bool, http: int
) -> Found:
    """Ask as everybody but the owner of a right key; nothing is computed for them."""
    before = counts(walk, http)
    assert before.keys() == {*COUNTED, "expertmesh_refused_callers"}
    strangers = [state for state in State if state not in (State.RIGHT, State.PLAIN)]
    found = asked(kinds, walk, asks_clients, strangers)
    after = counts(walk, http)
    assert [after[name] - before[name] for name in COUNTED] == [0, 0, 0]
    assert after["expertmesh_refused_callers"] > before["expertmesh_refused_callers"] + 100
    return found


def of_version(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Let a context speak one version alone, whatever the system thinks of it."""
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    return context


def speaks_no_old_tls(port: int, pair: Pair) -> None:
    """Assert which versions a port speaks, to a client that speaks each of them alone."""

    def version_of(version: ssl.TLSVersion) -> str | None:
        context = of_version(pair.context(), version)
        with (
            socket.create_connection((HOST, port), timeout=ASK_S) as raw,
            context.wrap_socket(raw, server_hostname=HOST) as connection,
        ):
            return connection.version()

    for old in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        server = of_version(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), old)
        server.load_cert_chain(pair.server, pair.key)
        client = of_version(pair.context(), old)
        client.check_hostname = False
        shake_hands(server, client)  # whoever speaks it is understood
        with pytest.raises((ssl.SSLError, ConnectionError)):
            version_of(old)
    assert version_of(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert version_of(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


def assert_is(found: Found, wanted: answered.Cells) -> None:
    """Assert that each cell has the one outcome of the rule, and write the table where asked."""
    wrong = [
        f"{port.name}, {group.value}, {state.value}: {outcomes}"
        for (port, group), states in found.items()
        for state, outcomes in states.items()
        if outcomes.keys() != {wanted[port, group][state]}
    ]
    assert not wrong, "against the rule:\n" + "\n".join(wrong)
    assert found.keys() == wanted.keys()
    if VARIABLE in os.environ:
        cells = {row: {s: o for s, [o] in states.items()} for row, states in found.items()}
        Path(os.environ[VARIABLE]).write_text(answered.table(cells), encoding="utf-8")
