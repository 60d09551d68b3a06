"""TLS inside a cluster: both ends of a connection need a certificate of the configured authority.

Certificates are replaced while processes run, so a context uses the files as they are when a
connection is made. ``experts.tls`` covers streams and links; Ray's calls have Ray's own TLS.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cluster.errors import ConfigError
from cluster.private_file import exposure

LOOK_S = 1.0
"""The files are looked at when a connection is made, at most once in this time."""
RAY_TLS_VARIABLE = "RAY_USE_TLS"
NEEDS_RAY_TLS = (
    f"needs {RAY_TLS_VARIABLE}=1 in the environment of all processes of Ray: its calls bring "
    "prompts, tokens, hidden states and Ray's own token from node to node, and would be in plain "
    "text"
)
_EXPIRED = 10
"""OpenSSL's ``X509_V_ERR_CERT_HAS_EXPIRED``."""
_FLIGHTS = 3
"""After so many turns of both ends a TLS 1.3 handshake has ended."""

logger = logging.getLogger("expertmesh.tls")

Content = TypeVar("Content")
Stamp = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and time of change (ns) of each file; ``None`` for a file that is not there."""


def ray_is_encrypted(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether the calls of Ray are encrypted; Ray reads the variable in the same way."""
    return variables.get(RAY_TLS_VARIABLE, "").lower() in ("1", "true")


def require_ray_tls(where: str, variables: Mapping[str, str] = os.environ) -> None:
    """Raise :class:`ConfigError` with the field ``where`` unless Ray's calls are encrypted.

    Some traffic has no other way than Ray: the first request of a gateway to a router, and what is
    sent again after a connection broke. To encrypt only the rest would protect nothing, because who
    reads Ray's token can run any code.
    """
    if not ray_is_encrypted(variables):
        raise ConfigError(NEEDS_RAY_TLS, where)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files, equal on every node: the node's certificate and key, the authority."""

    certificate: str
    key: str
    authority: str

    def server_context(self, where: str = "experts.tls") -> ssl.SSLContext:
        """Return the TLS context of the side that listens; it follows changes of the files.

        Raises :class:`ConfigError` for an unusable file; its field is the file's key in ``where``.
        A certificate is unusable that does not fit its key, or that a node with the same files
        would refuse: it has expired, or another authority has signed it. Of files that become
        unusable later an error is logged, and the earlier ones stay in use.
        """
        return _CurrentContext(ssl.PROTOCOL_TLS_SERVER, self, where)

    def client_context(self, where: str = "experts.tls") -> ssl.SSLContext:
        """Return the TLS context of the side that connects; see :meth:`server_context`."""
        return _CurrentContext(ssl.PROTOCOL_TLS_CLIENT, self, where)

    def read(self, protocol: int, where: str) -> ssl.SSLContext:
        """Return a context of the files as they are now; see :meth:`server_context`."""
        server = self._context(ssl.PROTOCOL_TLS_SERVER, where)
        client = self._context(ssl.PROTOCOL_TLS_CLIENT, where)
        self._check_validity(server, client, where)
        return server if protocol == ssl.PROTOCOL_TLS_SERVER else client

    def stamp(self) -> Stamp:
        """Return what changes whenever a file does."""
        return tuple(map(stamp_of, astuple(self)))

    def _context(self, protocol: int, where: str) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Nodes come and go and have only addresses, so their certificates need no host names.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        for name in ("certificate", "key", "authority"):
            path = getattr(self, name)
            if not Path(path).is_file():
                raise ConfigError(f"no such file: {path}", f"{where}.{name}")
        if reason := exposure(Path(self.key)):
            raise ConfigError(f"{self.key} {reason}", f"{where}.key")
        try:
            context.load_verify_locations(self.authority)
        except OSError as error:
            raise ConfigError(f"cannot be used: {error}", f"{where}.authority") from None
        try:
            # An encrypted key would make OpenSSL ask the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            reason = f"cannot be used: {error}"
            if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
                reason = f"{self.certificate} does not fit its key,  {self.key}"
            raise ConfigError(reason, f"{where}.certificate") from None
        return context

    def _check_validity(self, server: ssl.SSLContext, client: ssl.SSLContext, where: str) -> None:
        """Raise :class:`ConfigError` unless two nodes with these files accept each other."""
        try:
            shake_hands(server, client)
        except ssl.SSLCertVerificationError as error:
            name = "certificate"
            if error.verify_code == _EXPIRED and _has_expired_authority(client):
                name = "authority"
            path = getattr(self, name)
            reason = f"{path} is refused by TLS: {error.verify_message}"
            raise ConfigError(reason, f"{where}.{name}") from None
        except ssl.SSLError as error:
            raise ConfigError(f"cannot be used: {error}", f"{where}.certificate") from None


class Followed(Generic[Content]):
    """What files of TLS have, read again when they change; safe for several threads.

    Of changed files that cannot be used an error is logged, and the content from before stays.
    """

    def __init__(self, stamp: Callable[[], Stamp], read: Callable[[], Content]) -> None:
        """``read`` raises :class:`ConfigError` for unusable files, at the start here too."""
        self._stamp_of, self._read = stamp, read
        self._looking = threading.Lock()
        self._stamp = stamp()  # before they are read: a later change is seen
        self._current = read()
        self._problem = ""
        self._looked_at_s = time.monotonic()

    @property
    def problem(self) -> str:
        """Why the files, as they are now, cannot be used; empty else."""
        self.current()
        return self._problem

    def current(self) -> Content:
        """Return the content in force: the same object until the files change.

        The files are looked at, at most once in :data:`LOOK_S`.
        """
        with self._looking:
            now_s = time.monotonic()
            if now_s - self._looked_at_s >= LOOK_S:
                self._looked_at_s = now_s
                self._look()
            return self._current

    def _look(self) -> None:
        stamp = self._stamp_of()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._current, self._problem = self._read(), ""
        except ConfigError as error:
            self._problem = str(error)
            logger.error("%s; the previous TLS files stay in force", error)
        else:
            logger.info("new connections use the changed TLS files")


class _CurrentContext(ssl.SSLContext):
    """A context of files that may change; safe for several threads.

    A connection is made of a context that the files were read into. Changed files come into use
    with the next connection; running connections keep their own.
    """

    def __new__(cls, protocol: int, files: TlsFiles, where: str) -> _CurrentContext:
        return super().__new__(cls, protocol)

    def __init__(self, protocol: int, files: TlsFiles, where: str) -> None:
        """Raises :class:`ConfigError`, as :meth:`TlsFiles.server_context` says."""
        self._contexts = Followed(files.stamp, lambda: files.read(protocol, where))

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        """See :class:`ssl.SSLContext`."""
        return self._contexts.current().wrap_socket(*args, **options)

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """See :class:`ssl.SSLContext`; event loops call it for each connection."""
        return self._contexts.current().wrap_bio(*args, **options)


def stamp_of(path: str) -> tuple[int, int, int] | None:
    """Return an element of a :data:`Stamp`."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _has_expired_authority(context: ssl.SSLContext) -> bool:
    ends = [str(authority["notAfter"]) for authority in context.get_ca_certs()]
    return any(ssl.cert_time_to_seconds(end) < time.time() for end in ends)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Let two ends in memory greet each other; raises ``ssl.SSLError`` where one refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_FLIGHTS):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
    if ends:
        raise ssl.SSLError("the handshake did not finish")
