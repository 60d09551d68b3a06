"""The table of who is answered is that of the rule, and the rule has every method and path."""

from __future__ import annotations

import pytest

from router.gateway.http_io import OPEN_PATHS
from router.gateway.http_io import ROLES as ROLES_OF_PATHS
from router.protos import admin_pb2, inference_pb2, open_inference_pb2
from router.security.keys import Role
from tests import answered
from tests.answered import (
    CERTIFICATES,
    DOCUMENT,
    PORTS,
    ROLES,
    Group,
    Outcome,
    State,
    document_with,
    expected,
    groups_of,
    rule,
    table,
)
from tests.long.test_answered import grpc_calls, http_calls

MADE_OF_KEYS = (Outcome.NO_KEY, Outcome.FORBIDDEN)


def test_the_document_has_the_table_of_the_rule() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == document_with(table(rule()), document), "python -m tests.answered --write"


def test_every_method_and_path_is_asked_for() -> None:
    rpcs = {call.path: call.group for call in grpc_calls()}
    for module in (inference_pb2, admin_pb2, open_inference_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for rpc in service.methods:
                group = rpcs[f"/{service.full_name}/{rpc.name}"]
                assert group is (Group.ADMIN if service.name == "Admin" else Group.INFERENCE)
    paths = {call.path: call.group for call in http_calls()}
    named = tuple(name.strip("`") for name in Group.PATHS.value.split(", "))
    assert all(path.startswith(named) for path, group in paths.items() if group is Group.PATHS)
    assert {path for path, group in paths.items() if group in answered.OPEN_GROUPS} == OPEN_PATHS
    for path, group in paths.items():
        if group not in answered.OPEN_GROUPS:
            assert ROLES[group] is ROLES_OF_PATHS.get(path, Role.INFERENCE), path


def test_a_stranger_gets_no_more_than_probes_and_what_ray_tells() -> None:
    told = {
        (port, group)
        for (port, group), outcomes in rule().items()
        if any(outcomes[state] is Outcome.ANSWERED for state in (State.NO_KEY, State.BAD_KEY))
    }
    assert told == {
        *((answered.RAY, group) for group in answered.RAY.groups),
        (answered.HTTP, Group.PROBES),
        (answered.HTTP, Group.LISTENS),
        (answered.GRPC, Group.CHECK),
        (answered.PROBE, Group.LISTENS),
    }


def test_reflection_is_absent_where_there_are_keys() -> None:
    for port in PORTS:
        if not port.is_http and port.has_keys:
            assert expected(port, Group.REFLECTION, State.RIGHT) is Outcome.ABSENT


@pytest.mark.parametrize("asks_clients", [True, False])
def test_certificates_matter_where_they_are_asked_for_and_keys_where_there_is_a_gateway(
    asks_clients: bool,
) -> None:
    for port in PORTS:
        for group in groups_of(port):
            outcomes = [expected(port, group, state, asks_clients) for state in State]
            of_certificates = {expected(port, group, state, asks_clients) for state in CERTIFICATES}
            wanted = Outcome.CLOSED if port.has_tls and asks_clients else Outcome.NOT_APPLICABLE
            assert of_certificates == {wanted}
            assert port.has_keys or not set(outcomes) & {*MADE_OF_KEYS}
            plain = expected(port, group, State.PLAIN, asks_clients)
            right = expected(port, group, State.RIGHT, asks_clients)
            assert plain is (Outcome.CLOSED if port.has_tls else right)
