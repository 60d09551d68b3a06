"""Keeps what Ray Serve opens to ``http_options.host``, where Serve itself takes all interfaces.

Serve 2.60 has a host for its HTTP ports and for HAProxy's two front ends. Its gRPC servers (a
gateway's own port, the fallback proxy's, the one between replicas) and HAProxy's metrics and
statistics listen on all interfaces, every user may enter HAProxy's folder, and anybody may ask for
the list of applications. Here functions of Serve are replaced, in each process before it opens a
port: in proxies by Serve's controller, which calls :func:`narrow_proxies` since
``deploy/base.yaml`` names it, in replicas by themselves.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import ray
from ray._common.network_utils import build_address
from ray.serve._private import default_impl, grpc_util, http_util
from ray.serve.config import HTTPOptions

from router.security.reach import is_loopback
from router.serve.changed import LOOPBACK, changed
from router.serve.encryption import (
    ENCRYPTED_LINES,
    direct_host,
    direct_options,
    encrypt_grpc,
    encrypt_http,
    follow_certificate,
    keep_http_behind_haproxy,
    keep_to_machine,
    write_certificate,
)
from router.serve.instance import SERVE_TIMEOUT_S, serve_controller
from router.serve.process import take_turns

_ALL = "[::]:"
_TEMPLATE = "HAPROXY_CONFIG_TEMPLATE"
_LINES = {
    "    bind :{{ config.metrics_port }}\n": "    bind "
    + LOOPBACK
    + ":{{ config.metrics_port }}\n",
    "  bind *:{{ config.stats_port }}\n": "  bind " + LOOPBACK + ":{{ config.stats_port }}\n",
}
"""Lines of Serve's template of HAProxy's configuration, each with its successor."""
_NARROWED = "_expertmesh_narrowed"
_OWN_SERVICE = "add_RayServeAPIServiceServicer_to_server"
_LIST_APPLICATIONS = "ListApplications"
"""A method of Serve's own service. Its other one, ``Healthz``, is what HAProxy asks."""

HostOf = Callable[[], str]
"""Tells the host of HTTP."""
OptionsOf = Callable[[], HTTPOptions]
"""Tells Serve's options of HTTP."""


@cache
def serves_http() -> HTTPOptions:
    """Return ``http_options`` of the Serve that this process is of.

    Serve's controller is asked from a thread: the callers are on an event loop, and Ray warns of
    calls that make one wait. Raises ``ray.exceptions.GetTimeoutError`` when there is no answer in
    :data:`~router.serve.instance.SERVE_TIMEOUT_S`.
    """

    def ask() -> HTTPOptions:
        asked = serve_controller().get_http_config.remote()
        return cast(HTTPOptions, ray.get(asked, timeout=SERVE_TIMEOUT_S))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def serves_host() -> str:
    """Return the host of :func:`serves_http`."""
    return str(serves_http().host)


def narrow_serve(options_of: OptionsOf = serves_http) -> None:
    """Let what Serve opens in this process from now on listen where HTTP does, and on loopback.

    With a certificate in ``http_options`` clients' ports have TLS (:mod:`router.serve.encryption`).

    Raises :class:`ServeChangedError` in a version of Serve that this module does not know: rather
    no server than an open one. A second call changes nothing.
    """
    if hasattr(default_impl, _NARROWED):
        return
    encrypt_grpc(default_impl, options_of)
    _narrow(default_impl, "add_grpc_address", lambda: direct_host(options_of()))
    encrypt_http(http_util)
    _close_applications(grpc_util)
    replica = sys.modules.get("ray.serve._private.replica")
    if replica is not None:
        _narrow(replica, "add_port_to_grpc_server", lambda: str(options_of().host))
        keep_http_behind_haproxy(replica)
    haproxy = sys.modules.get("ray.serve._private.haproxy")
    if haproxy is not None:
        setattr(haproxy, _TEMPLATE, narrowed_template(getattr(haproxy, _TEMPLATE)))
        _close_folder(haproxy.HAProxyApi)
        keep_to_machine(haproxy.HAProxyApi)
    setattr(default_impl, _NARROWED, True)


def describe_nothing() -> None:
    """Let gRPC servers that Serve opens in this process from now on have no reflection."""
    name = "enable_server_reflection"
    if not hasattr(grpc_util, name):
        raise changed(f"{grpc_util.__name__} has no {name}")
    setattr(grpc_util, name, lambda server: None)


def share_no_port(options_of: OptionsOf = serves_http) -> None:
    """Let a gateway of this process open no gRPC port on which somebody listens.

    gRPC lets servers share a port, and each of two clusters on one machine would then get calls of
    the other. A gateway tells Serve that a port is taken, and gets the next one.
    """
    open_port: Callable[[Any, str], None] = default_impl.add_grpc_address

    def unshared(server: Any, address: str) -> None:
        port = int(address.removeprefix(_ALL))
        for host in hosts_of(direct_host(options_of())) or ["0.0.0.0"]:
            _try_port(host, port)
        open_port(server, address)

    default_impl.add_grpc_address = unshared


def _try_port(host: str, port: int) -> None:
    """Raise the error that Serve takes for a port that somebody listens on, if so."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise RuntimeError(f"port {port} of {host} cannot be had") from error


def narrow_proxies() -> None:
    """Let the proxies that this process makes, Serve's controller, narrow their own processes.

    This process and the proxies also take turns with processes that compute
    (:func:`~router.serve.process.take_turns`). Serve calls this function by
    ``RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH``. Raises :class:`ServeChangedError` where proxies
    are no longer the actors that this module knows.
    """
    from ray.serve._private import haproxy, proxy

    for actor in (haproxy.HAProxyManager, proxy.ProxyActor):
        metadata = getattr(actor, "__ray_metadata__", None)
        if metadata is None:
            raise changed(f"{actor} is no actor")
        made = metadata.modified_class
        made.__init__ = _narrowed_start(made.__init__, actor is haproxy.HAProxyManager)
    take_turns()


def _narrowed_start(start: Callable[..., None], is_haproxy: bool) -> Callable[..., None]:
    """Return a proxy's constructor that prepares its process first; Ray pickles it by value."""

    def __init__(self: Any, http_options: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        take_turns()
        narrow_serve(lambda: http_options)
        options = http_options if is_haproxy else direct_options(http_options)
        start(self, options, *args, **kwargs)
        if is_haproxy:
            follow_certificate(self)

    return __init__


def narrowed_template(template: str) -> str:
    """Return the template of HAProxy's configuration with its metrics and statistics on loopback.

    They ask for no key. Where there is a certificate, clients' ports have TLS. Raises
    :class:`ServeChangedError` where a line that is to be replaced is not there once.
    """
    for old, new in (_LINES | ENCRYPTED_LINES).items():
        if template.count(old) != 1:
            raise changed(f"HAProxy's template has not one line {old.strip()!r}")
        template = template.replace(old, new)
    return template


def hosts_of(host: str) -> list[str]:
    """Return the addresses that a server opens for a host of HTTP; none means all interfaces."""
    if is_loopback(host):
        return [host]
    with suppress(ValueError):  # a name
        if ip_address(host).is_unspecified:
            return []
    return [host, LOOPBACK]


def _narrow(module: ModuleType, name: str, host_of: HostOf) -> None:
    """Let a function of Serve, which gets a gRPC server and an address, open fewer addresses."""
    open_port: Callable[[Any, str], int | None] | None = getattr(module, name, None)
    if open_port is None:
        raise changed(f"{module.__name__} has no {name}")

    def narrowed(server: Any, address: str) -> int | None:
        if not address.startswith(_ALL):
            raise changed(f"{name} was to open {address!r}")
        hosts = hosts_of(host_of())
        if not hosts:
            return open_port(server, address)
        port: int | None = int(address.removeprefix(_ALL))
        for host in hosts:  # port 0 is any, and then the same on the next
            port = open_port(server, build_address(host, port)) or port
        return port

    setattr(module, name, narrowed)


def _close_applications(module: ModuleType) -> None:
    """Let Serve's own service tell nobody which applications there are."""
    register: Callable[[Any, Any], None] | None = getattr(module, _OWN_SERVICE, None)
    if register is None:
        raise changed(f"{module.__name__} has no {_OWN_SERVICE}")

    def register_closed(servicer: Any, server: Any) -> None:
        register(servicer, _WithoutApplications(server))

    setattr(module, _OWN_SERVICE, register_closed)


class _WithoutApplications:
    """A gRPC server to which Serve's own service is added without its list of applications."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        """Add handlers by the path of each method."""
        [handler] = generic_rpc_handlers
        handlers = handler._method_handlers
        kept = {path: h for path, h in handlers.items() if not path.endswith(_LIST_APPLICATIONS)}
        if len(kept) != len(handlers) - 1:
            raise changed(f"Serve's own service has the methods {', '.join(handlers)}")
        handler._method_handlers = kept
        self._server.add_generic_rpc_handlers((handler,))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add handlers by the name of each method."""
        kept = {name: h for name, h in handlers.items() if name != _LIST_APPLICATIONS}
        self._server.add_registered_method_handlers(service, kept)


def _close_folder(api: type) -> None:
    """Let this user alone enter HAProxy's folder, in which its admin socket and its key are."""
    name = "_initialize_directories_and_error_files"
    initialize: Callable[[Any], None] | None = getattr(api, name, None)
    if initialize is None:
        raise changed(f"{api.__name__} has no {name}")

    def initialize_closed(self: Any) -> None:
        folder = Path(self.cfg.socket_path).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        initialize(self)
        write_certificate(self.cfg)

    setattr(api, name, initialize_closed)
