"""Serve's part of a deployment file: what is filled in, what stays, and what is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

import deploy
from benchmarks.shipped import SERVE_KEYS
from cluster.errors import ConfigError
from router.config.deployment import GatewayConfig, parse_deployment
from router.serve.options import (
    NO_PROXIES,
    REPLICA_VARIABLES,
    check_serve_part,
    completed,
    starter_text,
)

DEPLOY = Path(deploy.__file__).parent
ARGS = {"models": [{"id": "m", "path": "models/mesh-tiny"}]}
APPLICATIONS = [{"name": "a", "import_path": "router.app:build", "args": ARGS}]
SHORT: dict[str, Any] = {"applications": APPLICATIONS}


def variables(document: dict[str, Any]) -> dict[str, str]:
    """Return the environment that a document gives Serve's own processes."""
    found: dict[str, str] = document["controller_options"]["runtime_env"]["env_vars"]
    return found


def test_a_file_of_applications_alone_gets_all_of_serves_part() -> None:
    document = completed(SHORT)
    assert document.keys() == {*SERVE_KEYS, "applications"}
    assert document["applications"] == APPLICATIONS
    assert document == completed({}) | SHORT
    config = ServeDeploySchema.model_validate(document)
    assert config.proxy_location == ProxyLocation.Disabled
    assert config.logging_config is not None
    assert config.logging_config.log_level == "WARNING"
    check_serve_part(document)


def test_what_a_file_says_stays_key_by_key() -> None:
    document = {
        **SHORT,
        "logging_config": {"log_level": "DEBUG"},
        "controller_options": {"runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "2", "OWN": "1"}}},
        "tracing_config": {"enabled": True},
    }
    given = deepcopy(document)
    whole, base = completed(document), completed({})
    assert document == given
    assert whole["logging_config"] == base["logging_config"] | {"log_level": "DEBUG"}
    assert variables(whole) == variables(base) | {"MALLOC_ARENA_MAX": "2", "OWN": "1"}
    assert whole["proxy_location"] == "Disabled"
    assert whole["tracing_config"] == {"enabled": True}
    assert completed(whole) == whole
    for key in ("logging_config", "controller_options"):  # as if it was left out
        assert completed({**SHORT, key: None}) == completed(SHORT)


@pytest.mark.parametrize("wrong", ["WARNING", [1], 3])
def test_what_is_no_section_is_left_for_serve_to_refuse(wrong: Any) -> None:
    whole = completed({**SHORT, "logging_config": wrong})
    assert whole["logging_config"] == wrong
    with pytest.raises(ValueError, match="logging_config"):
        ServeDeploySchema.model_validate(whole)


def test_a_starter_file_is_whole_and_has_comments() -> None:
    text = starter_text()
    document = yaml.safe_load(text)
    assert text == (DEPLOY / "cluster.yaml").read_text(encoding="utf-8")
    assert document == completed(document)
    assert f"{NO_PROXIES} # the gateways listen by themselves" in text
    [(name, config)] = parse_deployment(document, Path("new"))
    assert (name, config.models[0].id) == ("expertmesh", "mesh-tiny")


def test_a_replica_gets_what_the_file_gives_serve() -> None:
    given = variables(completed({}))
    shared = REPLICA_VARIABLES.keys() & given.keys()
    assert shared == {"RAY_SERVE_LOG_TO_STDERR"}
    assert all(REPLICA_VARIABLES[name] == given[name] for name in shared)


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        (
            {"http_options": {"host": "127.0.0.1", "port": 81}},
            {"host": "127.0.0.1", "http_port": 81},
        ),
        ({"http_options": {}}, {}),
        ({"http_options": None, "grpc_options": {"port": 91}}, {"grpc_port": 91}),
        # Serve's own default of the host is all interfaces.
        (
            {"http_options": {"port": 81}, "grpc_options": {"port": 91}},
            {"host": "0.0.0.0", "http_port": 81, "grpc_port": 91},
        ),
        (
            {"http_options": {"ssl_certfile": "c", "ssl_keyfile": "k", "ssl_ca_certs": "a"}},
            {"host": "0.0.0.0", "tls": {"certificate": "c", "key": "k", "client_authority": "a"}},
        ),
        ({"http_options": "many"}, {}),
        ({"grpc_options": [9000]}, {}),
    ],
)
def test_options_of_serves_proxies_are_refused_with_what_to_write_instead(
    options: dict[str, Any], instead: dict[str, Any]
) -> None:
    key = next(name for name in options if options[name] is not None)
    with pytest.raises(ConfigError, match=f"^{key}: is of Serve's proxies") as refused:
        check_serve_part(completed({**SHORT, **options}))
    if not instead:
        assert refused.value.message.endswith("; leave it out")
        return
    _, told = refused.value.message.split("args.gateway: ")
    gateway = yaml.safe_load(told)
    assert gateway == {"listen": instead}
    GatewayConfig.model_validate(gateway)


@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode", None])
def test_proxies_anywhere_are_refused(location: str | None) -> None:
    """Serve itself must be told to run none."""
    for document in ({**SHORT, "proxy_location": location}, *([] if location else [SHORT])):
        told = f"^proxy_location: must be Disabled.* got {location or 'nothing'}"
        with pytest.raises(ConfigError, match=told) as refused:
            check_serve_part(document)
        if location is None:
            assert f"Write `{NO_PROXIES}` at the top of the file" in refused.value.message


def with_prefixes(*prefixes: str | None) -> dict[str, Any]:
    """Return a file with an application for each prefix."""
    return {"applications": [{**APPLICATIONS[0], "route_prefix": prefix} for prefix in prefixes]}


def test_an_application_has_its_own_ports_and_no_prefix() -> None:
    for document in ({}, SHORT, with_prefixes("/"), with_prefixes("/", None)):
        check_serve_part(completed(document))
    with pytest.raises(ConfigError, match=r"^applications\[0\]\.route_prefix: must be / .* /llm"):
        check_serve_part(completed(with_prefixes("/llm")))
    with pytest.raises(ConfigError, match=r"^applications\[1\]\.route_prefix: must be / .* /b"):
        check_serve_part(completed(with_prefixes("/", "/b")))
