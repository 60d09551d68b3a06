"""Which transport a router uses, as its configuration says."""

from __future__ import annotations

from cluster.spec import TransportKind
from cluster.tls import TlsFiles
from cluster.transport.base import Transport
from cluster.transport.ray import RayActors, RayTransport
from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector


def open_transport(app: str, kind: TransportKind, tls: TlsFiles | None = None) -> Transport:
    """Return the transport to the expert actors of an application.

    ``ray`` makes a Ray call of every frame. ``stream`` sends them over connections held open to the
    actors, and nothing else. ``auto`` does too, and makes a Ray call where and while there is no
    connection. ``tls`` encrypts connections between hosts, not Ray's calls, which have Ray's own.
    """
    actors = RayActors(app)
    if kind == "ray":
        return RayTransport(actors)
    connector = Connector(actors.offer, None if tls is None else tls.client_context())
    return StreamTransport(connector, RayTransport(actors) if kind == "auto" else None)
