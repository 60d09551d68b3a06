"""Serve's servers listen where HTTP does, and its HAProxy too; a Serve that changed is refused."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
from ray.serve._private import default_impl, haproxy
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray.serve.config import HTTPOptions

from benchmarks.shipped import free_ports
from router.serve.changed import ServeChangedError
from router.serve.listening import (
    _close_folder,
    _narrow,
    hosts_of,
    narrow_proxies,
    narrowed_template,
    share_no_port,
)
from router.serve.options import base_document, serve_variables

OPEN = "add_grpc_address"


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    server = grpc.server(ThreadPoolExecutor(1))
    yield server
    server.stop(None)


def opened_for(host: str, address: str, server: Any) -> tuple[int | None, list[tuple[str, int]]]:
    """Open a port as Serve does; returns it, and where it is."""
    opened: list[tuple[str, int]] = []

    def open_port(server: Any, address: str) -> int:
        port: int = server.add_insecure_port(address)
        opened.append((address.rpartition(":")[0], port))
        return port

    module = ModuleType("of_serve")
    setattr(module, OPEN, open_port)
    _narrow(module, OPEN, lambda: host)
    return getattr(module, OPEN)(server, address), opened


def test_a_grpc_server_on_loopback_is_reached_from_nowhere_else(server: grpc.Server) -> None:
    port, _ = opened_for("127.0.0.1", "[::]:0", server)
    server.start()
    listening = [
        one.laddr.ip.removeprefix("::ffff:")
        for one in psutil.Process().net_connections("inet")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("host", "hosts"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["localhost"]),
        ("::1", ["::1"]),
        ("10.1.2.3", ["10.1.2.3", "127.0.0.1"]),
        ("gateway.lan", ["gateway.lan", "127.0.0.1"]),
        ("0.0.0.0", []),
        ("::", []),
    ],
)
def test_a_host_of_http_is_that_of_all(host: str, hosts: list[str]) -> None:
    assert hosts_of(host) == hosts


def test_a_free_port_is_the_same_on_each_address() -> None:
    anywhere = SimpleNamespace(add_insecure_port=lambda address: 4242)
    port, opened = opened_for("10.1.2.3", "[::]:0", anywhere)
    assert port == 4242
    assert opened == [("10.1.2.3", 4242), ("127.0.0.1", 4242)]


def test_all_interfaces_are_opened_where_http_is_on_all(server: grpc.Server) -> None:
    port, opened = opened_for("0.0.0.0", "[::]:0", server)
    assert opened == [("[::]", port)]


def test_an_address_that_serve_never_opened_is_refused(server: grpc.Server) -> None:
    with pytest.raises(ServeChangedError, match=r"was to open '0\.0\.0\.0:0'"):
        opened_for("127.0.0.1", "0.0.0.0:0", server)


def test_haproxy_shows_its_metrics_and_its_statistics_to_the_machine_alone() -> None:
    lines = narrowed_template(HAPROXY_CONFIG_TEMPLATE).splitlines()
    binds = [line.split("bind ")[1] for line in lines if line.lstrip().startswith("bind ")]
    assert [bind.rpartition(":{{")[0] for bind in binds] == [
        "127.0.0.1",
        "{{ config.frontend_host }}",
        "{{ config.grpc_frontend_host }}",
        "127.0.0.1",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_gateway_takes_no_port_that_another_clusters_gateway_has(
    monkeypatch: pytest.MonkeyPatch, server: grpc.Server, host: str
) -> None:
    opened: list[str] = []
    other = server.add_insecure_port("127.0.0.1:0")
    server.start()
    [free] = free_ports(1)
    monkeypatch.setattr(
        default_impl, OPEN, lambda server, address: opened.append(address), raising=True
    )
    share_no_port(lambda: HTTPOptions(host=host))
    with pytest.raises(RuntimeError, match=f"port {other} of {host}") as refused:
        default_impl.add_grpc_address(server, f"[::]:{other}")
    assert isinstance(refused.value.__cause__, OSError)
    assert refused.value.__cause__.errno == errno.EADDRINUSE  # Serve's sign to try the next
    default_impl.add_grpc_address(server, f"[::]:{free}")
    assert opened == [f"[::]:{free}"]


@pytest.mark.parametrize("template", ["", 2 * HAPROXY_CONFIG_TEMPLATE])
def test_another_template_is_refused(template: str) -> None:
    with pytest.raises(ServeChangedError, match="HAProxy's template has not one line 'bind"):
        narrowed_template(template)


def test_a_function_that_serve_no_longer_has_is_named() -> None:
    with pytest.raises(ServeChangedError, match="of_serve has no add_grpc_address"):
        _narrow(ModuleType("of_serve"), OPEN, lambda: "127.0.0.1")


def test_haproxys_folder_is_closed_to_other_users_before_anything_is_in_it(tmp_path: Path) -> None:
    folder, modes = tmp_path / "haproxy" / "node", []

    class Api:
        cfg = SimpleNamespace(socket_path=str(folder / "admin.sock"), http_options=HTTPOptions())

        def _initialize_directories_and_error_files(self) -> None:
            modes.append(stat.S_IMODE(folder.stat().st_mode))

    _close_folder(Api)
    Api()._initialize_directories_and_error_files()
    assert modes == [0o700]


def test_serves_controller_is_told_to_narrow_its_proxies() -> None:
    named = serve_variables(base_document())["RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"]
    assert named == f"{narrow_proxies.__module__}:{narrow_proxies.__name__}"


def test_proxies_that_are_no_actors_any_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy, "HAProxyManager", object)
    with pytest.raises(ServeChangedError, match="is no actor; Ray 2"):
        narrow_proxies()
