"""Serve's part of a deployment file: what is filled in, and what the file's own word is."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema

import deploy
from router.config import parse_deployment
from router.serve.options import (
    HAPROXY,
    REPLICA_VARIABLES,
    base_document,
    completed,
    replica_variables,
    serve_variables,
    starter_text,
)

DEPLOY = Path(deploy.__file__).parent
SERVE_KEYS = {
    "proxy_location",
    "http_options",
    "grpc_options",
    "logging_config",
    "controller_options",
}
APPLICATIONS = [
    {
        "name": "a",
        "import_path": "router.app:build",
        "args": {"models": [{"id": "m", "path": "models/mesh-tiny"}]},
    }
]
SHORT = {"applications": APPLICATIONS}


def test_a_file_of_applications_alone_gets_all_of_serves_part() -> None:
    document = completed(SHORT)
    assert document == base_document() | SHORT
    assert document.keys() - {"applications"} == SERVE_KEYS
    config = ServeDeploySchema.model_validate(document)
    assert config.http_options.host == "127.0.0.1"
    [add_services] = gRPCOptions(**config.grpc_options.model_dump()).grpc_servicer_func_callable
    assert add_services.__name__ == "add_services_to_server"
    assert config.controller_options.runtime_env["env_vars"][HAPROXY] == "1"


def test_what_a_file_says_stays_key_by_key() -> None:
    document = {
        **SHORT,
        "proxy_location": "HeadOnly",
        "http_options": {"port": 81, "root_path": "/x"},
        "grpc_options": {"port": 91},
        "controller_options": {"runtime_env": {"env_vars": {HAPROXY: "0", "OWN": "1"}}},
        "tracing_config": {"enabled": True},
    }
    given = deepcopy(document)
    whole = completed(document)
    base = base_document()
    assert document == given
    assert whole["proxy_location"] == "HeadOnly"
    assert whole["http_options"] == base["http_options"] | given["http_options"]
    assert whole["grpc_options"] == base["grpc_options"] | {"port": 91}
    assert serve_variables(whole) == serve_variables(base) | {HAPROXY: "0", "OWN": "1"}
    assert whole["logging_config"] == base["logging_config"]
    assert whole["tracing_config"] == {"enabled": True}
    assert completed(whole) == whole


@pytest.mark.parametrize("key", sorted(SERVE_KEYS - {"proxy_location"}))
def test_a_key_with_nothing_below_it_is_as_if_it_was_left_out(key: str) -> None:
    assert completed({**SHORT, key: None}) == completed(SHORT)


@pytest.mark.parametrize("wrong", ["9000", [9000], 3])
def test_what_is_no_section_is_left_for_serve_to_refuse(wrong: Any) -> None:
    whole = completed({**SHORT, "grpc_options": wrong})
    assert whole["grpc_options"] == wrong
    with pytest.raises(ValueError, match="grpc_options"):
        ServeDeploySchema.model_validate(whole)


def test_a_cluster_that_runs_is_listened_to_by_other_machines_too() -> None:
    assert "host" not in completed(SHORT, joins=True)["http_options"]
    own = {**SHORT, "http_options": {"host": "127.0.0.1"}}
    assert completed(own, joins=True)["http_options"]["host"] == "127.0.0.1"


def test_haproxy_is_not_asked_for_where_there_is_none() -> None:
    assert HAPROXY not in serve_variables(completed(SHORT, has_haproxy=False))
    own = {**SHORT, "controller_options": {"runtime_env": {"env_vars": {HAPROXY: "1"}}}}
    assert serve_variables(completed(own, has_haproxy=False))[HAPROXY] == "1"


@pytest.mark.parametrize("document", [{}, {"controller_options": None}, base_document()])
def test_the_variables_of_any_document_can_be_read(document: dict[str, Any]) -> None:
    assert (HAPROXY in serve_variables(document)) == (document == base_document())


def test_a_starter_file_is_whole_and_has_the_comments_of_the_base() -> None:
    text = starter_text()
    document = yaml.safe_load(text)
    assert document == completed(document)
    assert document.keys() == {*SERVE_KEYS, "applications"}
    shipped = yaml.safe_load((DEPLOY / "cluster.yaml").read_text(encoding="utf-8"))
    assert document["applications"] == shipped["applications"]
    assert "# HAProxy, which comes with ray[serve] on Linux" in text
    [(name, config)] = parse_deployment(document, Path("new"))
    assert (name, config.models[0].id) == ("expertmesh", "mesh-tiny")


def test_a_replica_gets_what_its_builder_does_not_have_from_serve() -> None:
    base = serve_variables(base_document())
    assert replica_variables({}) == {name: base[name] for name in REPLICA_VARIABLES}
    assert replica_variables(base) == {}
    one = REPLICA_VARIABLES[0]
    assert one not in replica_variables({one: "1"})
