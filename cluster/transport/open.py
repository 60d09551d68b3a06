"""The choice of a router's transport by its configuration."""

from __future__ import annotations

from cluster.spec import TransportKind
from cluster.tls import TlsFiles
from cluster.transport.base import Transport
from cluster.transport.ray import RayActors, RayTransport
from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector


def open_transport(app: str, kind: TransportKind, tls: TlsFiles | None = None) -> Transport:
    """Return the transport to the expert actors of an application.

    ``ray`` sends every frame as a Ray call. ``stream`` sends frames over open connections to the
    actors alone. ``auto`` uses streams, and Ray calls while an actor has no stream. ``tls``
    encrypts streams between hosts. Ray has its own encryption for its calls.
    """
    actors = RayActors(app)
    if kind == "ray":
        return RayTransport(actors)
    connector = Connector(actors.offer, None if tls is None else tls.client_context())
    return StreamTransport(connector, RayTransport(actors) if kind == "auto" else None)
