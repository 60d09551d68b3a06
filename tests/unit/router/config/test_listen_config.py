"""Where gateways listen: what ``gateway.listen`` comes to, and what is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ConfigError
from router.config.deployment import parse_args
from router.config.listen import ListenConfig
from router.security.certificates import CertificateFiles

MODELS = [{"id": "a", "path": "models/mesh-tiny"}]


def listen(**keys: Any) -> ListenConfig:
    """Return the section as an application's args have it."""
    return parse_args({"models": MODELS, "gateway": {"listen": keys}}).gateway.listen


def test_without_the_section_gateways_listen_on_loopback_in_plain_text() -> None:
    config = parse_args({"models": MODELS}).gateway.listen
    assert config == listen() == ListenConfig()
    assert (config.host, config.admin_host, config.tls) == ("127.0.0.1", "127.0.0.1", None)
    assert config.ports() == {"http_port": 8000, "grpc_port": 9000, "admin_port": 9001}


def test_the_port_for_probes_is_one_of_the_ports_and_never_leaves_the_machine() -> None:
    config = listen(host="0.0.0.0", admin_host="10.1.2.3", health_port=81)
    assert config.ports()["health_port"] == 81
    assert {key: config.host_of(key) for key in config.ports()} == {
        "http_port": "0.0.0.0",
        "grpc_port": "0.0.0.0",
        "admin_port": "10.1.2.3",
        "health_port": "127.0.0.1",
    }


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"http_port": 9000}, "port 9000 is given 2 times; each needs its own"),
        ({"admin_port": 8000}, "port 8000 is given 2 times"),
        ({"health_port": 9001}, "port 9001 is given 2 times"),
        ({"http_port": 7, "grpc_port": 7, "admin_port": 7}, "port 7 is given 3 times"),
    ],
)
def test_each_port_needs_its_own_number(keys: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"args\.gateway\.listen: .*{reason}"):
        listen(**keys)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0", "gateway.lan", "localhost"])
def test_addresses_and_names_are_hosts(host: str) -> None:
    config = listen(host=host, admin_host=host)
    assert (config.host_of("http_port"), config.host_of("admin_port")) == (host, host)


@pytest.mark.parametrize("key", ["host", "admin_host"])
@pytest.mark.parametrize("host", ["[::1]", "http://gateway.lan", "10.0.0.0/8", "a b"])
def test_what_is_no_host_is_refused_by_its_key(key: str, host: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"args\.gateway\.listen\.{key}: .*is neither an address"
    ):
        listen(**{key: host})


@pytest.mark.parametrize("authority", [{}, {"client_authority": "a"}])
def test_files_of_tls_are_named_with_and_without_an_authority(authority: dict[str, str]) -> None:
    tls = listen(tls={"certificate": "c", "key": "k", **authority}).tls
    assert tls is not None
    assert tls.files() == CertificateFiles("c", "k", authority.get("client_authority"))


BAD_TLS: list[tuple[dict[str, str], str]] = [
    ({}, "certificate"),
    ({"certificate": "c"}, "key"),
    ({"key": "k"}, "certificate"),
    ({"client_authority": "a"}, "certificate"),
    ({"certificate": "", "key": "k"}, "certificate"),
    ({"certificate": "c", "key": "k", "client_authority": ""}, "client_authority"),
    ({"certificate": "c", "key": "k", "password": "p"}, "password"),
]


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        *(({"tls": tls}, f"listen.tls.{key}: ") for tls, key in BAD_TLS),
        *(({"head_timeout_s": limit_s}, "listen.head_timeout_s: ") for limit_s in (0, -1, 301)),
        ({"port": 80}, "listen.port: unknown key"),
    ],
)
def test_what_is_wrong_is_refused_by_its_key(keys: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=rf"^args\.gateway\.{where}"):
        listen(**keys)


PORTS = [(f"{name}_port", 1, 65_535) for name in ("http", "grpc", "admin", "health")]


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        *PORTS,
        ("max_connections", 1, 100_000),
        ("max_connections_per_address", 1, 100_000),
        ("max_head_bytes", 1024, 1 << 20),
    ],
)
def test_numbers_outside_their_bounds_are_refused_by_their_key(
    key: str, least: int, most: int
) -> None:
    for number in (least, most):
        assert getattr(listen(**{key: number}), key) == number
    for number in (least - 1, most + 1, "many", None if key != "health_port" else -1):
        with pytest.raises(ConfigError, match=rf"^args\.gateway\.listen\.{key}: "):
            listen(**{key: number})


def test_a_head_may_take_some_time() -> None:
    assert listen(head_timeout_s=300).head_timeout_s == 300


@pytest.mark.parametrize("former", ["admin_host", "admin_port"])
def test_keys_where_they_stood_before_are_unknown(former: str) -> None:
    with pytest.raises(ConfigError, match=rf"^args\.gateway\.{former}: unknown key"):
        parse_args({"models": MODELS, "gateway": {former: 80}})
