"""TLS on the ports that clients reach, by the certificate in ``http_options``.

Serve 2.60 gives it to its Python servers of HTTP alone, reads it once, and asks no client for a
certificate. HAProxy gets it here, and Serve's gRPC servers. Where HAProxy is in front, the gateways
behind it listen on loopback in plain text, and HAProxy calls those of its own machine alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ray.serve._private import constants
from ray.serve.config import HTTPOptions

from cluster.errors import ConfigError
from cluster.tls import LOOK_S
from router.security.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    Certificate,
    CertificateFiles,
    Certificates,
    certificates_of,
)
from router.security.reach import is_loopback
from router.serve.changed import LOOPBACK, changed, known
from router.serve.options import CALLBACK, NARROW_PROXIES

_TLS = (
    "{% if config.http_options.ssl_certfile %}"
    " ssl crt {{ config.socket_path }}.pem ssl-min-ver TLSv1.2 alpn %s"
    "{% if config.http_options.ssl_ca_certs %}"
    " ca-file {{ config.socket_path }}.clients.pem verify required{% endif %}{% endif %}"
)
_HTTP = "    bind {{ config.frontend_host }}:{{ config.frontend_port }}"
_GRPC = "    bind {{ config.grpc_frontend_host }}:{{ config.grpc_frontend_port }} proto h2"
_GLOBAL = "    maxconn {{ config.maxconn }}\n"
# Else a client whose authority was taken out would resume its session.
_NO_SESSIONS = (
    "    {%- if config.http_options.ssl_ca_certs %}\n"
    "    tune.ssl.cachesize 0\n"
    "    ssl-default-bind-options no-tls-tickets\n"
    "    {%- endif %}\n"
)
ENCRYPTED_LINES = {
    f"{_HTTP}\n": f"{_HTTP}{_TLS.replace('%s', 'h2,http/1.1')}\n",
    f"{_GRPC}\n": f"{_GRPC}{_TLS.replace('%s', 'h2')}\n",
    _GLOBAL: _GLOBAL + _NO_SESSIONS,
}
"""Lines of Serve's template of HAProxy's configuration, each with its successor."""
_DONE, _COMMAND_S = b"Success!", 5.0

logger = logging.getLogger("expertmesh.serve")


def certificates_in(options: HTTPOptions) -> Certificates | None:
    """Return the follower of the certificate that options of HTTP name, or ``None`` without TLS.

    Raises :class:`cluster.errors.ConfigError` for files that cannot be used.
    """
    files = CertificateFiles.of(options.model_dump(include={CERTIFICATE, KEY, AUTHORITY}))
    return None if files is None else certificates_of(files)


def check_encryption(options: HTTPOptions, variables: Mapping[str, str]) -> None:
    """Raise :class:`ConfigError` where proxies would answer in plain text, or anybody, beside TLS.

    ``variables`` are those that Serve's controller has, too.
    """
    if options.ssl_certfile and variables.get(CALLBACK) != NARROW_PROXIES:
        raise ConfigError(
            f"without {CALLBACK}={NARROW_PROXIES} in Serve's environment its proxies heed it not",
            f"http_options.{CERTIFICATE}",
        )


def is_behind_haproxy() -> bool:
    """Return whether HAProxy stands before the servers of this process."""
    return bool(constants.RAY_SERVE_ENABLE_HA_PROXY)


def direct_host(options: HTTPOptions) -> str:
    """Return where servers of this process listen that Serve opens: loopback before plain text."""
    host = str(options.host)
    has_plain_text = is_behind_haproxy() and bool(options.ssl_certfile)
    return LOOPBACK if has_plain_text and not is_loopback(host) else host


def direct_options(options: HTTPOptions) -> HTTPOptions:
    """Return the options of a server of HTTP of this process: without TLS behind HAProxy."""
    if not is_behind_haproxy() or not options.ssl_certfile:
        return options
    plain = {CERTIFICATE: None, KEY: None, AUTHORITY: None, "host": direct_host(options)}
    return options.model_copy(update=plain)


def keep_http_behind_haproxy(replica: ModuleType) -> None:
    """Let a gateway's own server of HTTP listen as :func:`direct_options` says."""
    start = known(replica, "start_asgi_http_server")

    async def start_direct(app: Any, http_options: HTTPOptions, **kwargs: Any) -> Any:
        return await start(app, direct_options(http_options), **kwargs)

    replica.start_asgi_http_server = start_direct  # type: ignore[attr-defined]


def encrypt_http(http_util: ModuleType) -> None:
    """Let Serve's servers of HTTP with TLS follow its files, and ask clients for certificates."""
    uvicorn = known(http_util, "uvicorn")

    class FollowingConfig(uvicorn.Config):  # type: ignore[misc, name-defined]
        """Uvicorn's configuration, with a context of its own making."""

        def load(self) -> None:
            super().load()
            options = {name: getattr(self, name) for name in (CERTIFICATE, KEY, AUTHORITY)}
            files = CertificateFiles.of(options)
            if files is not None:
                self.ssl = certificates_of(files).context()

    http_util.uvicorn = SimpleNamespace(  # type: ignore[attr-defined]
        Config=FollowingConfig, Server=uvicorn.Server
    )


def encrypt_grpc(module: ModuleType, options_of: Callable[[], HTTPOptions]) -> None:
    """Let Serve's servers of gRPC that clients reach have TLS."""
    name = "add_grpc_address"
    open_port: Callable[[Any, str], Any] = known(module, name)

    def encrypted(server: Any, address: str) -> Any:
        certificates = None if is_behind_haproxy() else certificates_in(options_of())
        if certificates is None:
            return open_port(server, address)
        return server.add_secure_port(address, certificates.grpc_credentials())

    setattr(module, name, encrypted)


def keep_to_machine(api: type) -> None:
    """Let HAProxy with TLS send nothing to other machines, where it would go in plain text."""
    set_backends = known(api, "set_backend_configs")
    set_fallback = known(api, "set_grpc_fallback_server")

    def set_backend_configs(self: Any, backend_configs: Mapping[str, Any]) -> None:
        if self.cfg.http_options.ssl_certfile:
            for backend in backend_configs.values():
                backend.servers = [one for one in backend.servers if is_loopback(one.host)]
                backend.fallback_server = _of_machine(backend.fallback_server)
        set_backends(self, backend_configs)

    def set_grpc_fallback_server(self: Any, server: Any) -> None:
        has_tls = bool(self.cfg.http_options.ssl_certfile)
        set_fallback(self, _of_machine(server) if has_tls else server)

    api.set_backend_configs = set_backend_configs  # type: ignore[attr-defined]
    api.set_grpc_fallback_server = set_grpc_fallback_server  # type: ignore[attr-defined]


def _of_machine(server: Any) -> Any:
    return server if server is not None and is_loopback(server.host) else None


def write_certificate(config: Any) -> Certificate | None:
    """Write the certificate in force for HAProxy, into its folder; returns it, if there is one.

    HAProxy starts anew whenever the gateways change, and must not stumble then over files that
    have become unusable. Raises as :func:`certificates_in` does.
    """
    certificates = certificates_in(config.http_options)
    if certificates is None:
        return None
    current = certificates.current()
    for path, text in _files(config.socket_path, current).items():
        new = Path(f"{path}.new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text)
        new.replace(path)
    return current


def _files(socket_path: str, certificate: Certificate) -> dict[str, bytes]:
    """Return HAProxy's files of a certificate, by path."""
    files = {f"{socket_path}.pem": _lines(certificate.chain) + _lines(certificate.key)}
    if certificate.authority is not None:
        files[f"{socket_path}.clients.pem"] = _lines(certificate.authority)
    return files


def _lines(pem: bytes) -> bytes:
    """Return a PEM text without empty lines, at which a command of HAProxy would end."""
    return b"".join(line.strip() + b"\n" for line in pem.splitlines() if line.strip())


def follow_certificate(manager: Any) -> None:
    """Let the HAProxy of Serve's ``HAProxyManager``, an actor, follow its certificate from now on.

    Does nothing without TLS. Needs the actor's event loop.
    """
    certificates = certificates_in(manager._http_options)
    for name in ("_haproxy", "_haproxy_start_task", "_reload_lock", "event_loop"):
        if not hasattr(manager, name):
            raise changed(f"HAProxyManager has no {name}")
    if certificates is not None:
        manager._following = manager.event_loop.create_task(_follow(manager, certificates))


async def _follow(manager: Any, certificates: Certificates) -> None:
    await manager._haproxy_start_task
    in_force: Certificate | None = None
    while True:
        current = await asyncio.to_thread(certificates.current)
        if current is not in_force:
            try:
                async with manager._reload_lock:  # a HAProxy that starts reads the files
                    in_force = await put_in_force(manager._haproxy)
            except (ConfigError, OSError, RuntimeError) as error:
                logger.error("HAProxy does not take the changed files of TLS: %s", error)
        await asyncio.sleep(LOOK_S)


async def put_in_force(haproxy: Any) -> Certificate | None:
    """Give a running HAProxy the certificate in force; streams go on.

    Its process goes on, unless a text is too long for its commands: then a new one takes over its
    ports, and it ends after its last stream. Returns the certificate.
    """
    current = await asyncio.to_thread(write_certificate, haproxy.cfg)
    if current is not None and not await _commit(haproxy, current):
        await haproxy.reload()
    return current


async def _commit(haproxy: Any, certificate: Certificate) -> bool:
    """Return whether HAProxy has taken the texts of a certificate."""
    socket_path = haproxy.cfg.socket_path
    try:
        async with asyncio.timeout(_COMMAND_S):
            for path, text in _files(socket_path, certificate).items():
                kind = "ca-file" if path.endswith(".clients.pem") else "cert"
                await _command(socket_path, f"set ssl {kind} {path} <<\n".encode() + text)
                answer = await _command(socket_path, f"commit ssl {kind} {path}".encode())
                if _DONE not in answer:
                    return False
    except (OSError, TimeoutError):  # HAProxy ends the connection of a command that is too long
        return False
    return True


async def _command(socket_path: str, command: bytes) -> bytes:
    """Return HAProxy's answer; Serve's own function for it logs the command, and so the key."""
    reader, writer = await asyncio.open_unix_connection(socket_path)
    try:
        writer.write(command + b"\n")
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()
