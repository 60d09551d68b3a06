"""Keeps web pages of other sites from using a gateway through their visitor's browser.

A page may send requests to this machine's ports, and one whose name changes to this machine's
address (DNS rebinding) may read the answers. Browsers tell the page's origin and the host's name,
and ask before they send a type of body that no form has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from cluster.errors import ForbiddenError, InvalidRequestError, MediaTypeError, shown

JSON = "application/json"
OF_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
"""The types of bodies that a browser sends to any site without asking it."""


@dataclass(frozen=True, slots=True)
class BrowserRules:
    """Which hosts and origins requests may name.

    ``is_local`` is whether the gateway serves this machine alone: ``Host`` is then ``localhost``,
    an address, or one of ``hosts``. ``origins`` are allowed beside the gateway's own.
    """

    is_local: bool = False
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise :class:`ForbiddenError` or :class:`MediaTypeError` for a request that may not be.

        A client that is no browser sends no ``Origin``, and for JSON its type.
        """
        host = headers.get("host", "")
        name = _host_name(host)
        if self.is_local and host and not (_is_own(name) or name in self.hosts):
            allowed = ", ".join(["localhost", "an IP address", *self.hosts])
            raise ForbiddenError(f"must be one of {allowed}; got {shown(host)}", "host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and _authority(origin) != host.lower():
            raise ForbiddenError(
                f"must be the gateway's own or one of gateway.origins; got {shown(origin)}",
                "origin",
            )
        if method == "POST":
            _check_type(path, headers.get("content-type", ""))


def _check_type(path: str, given: str) -> None:
    media_type = given.partition(";")[0].strip().lower()
    if path.startswith("/v1/") and media_type != JSON:
        raise MediaTypeError(f"must be {JSON}; got {shown(given)}", "content-type")
    if media_type in OF_FORMS:
        raise MediaTypeError(f"must not be a form's type; got {shown(given)}", "content-type")


def _host_name(host: str) -> str:
    """Return the name of a ``Host`` header, in lower case, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        raise InvalidRequestError(f"{shown(host)} is not a host", "host") from None


def _authority(origin: str) -> str | None:
    """Return the host and port of an origin; ``null`` has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _is_own(name: str) -> bool:
    """Return whether no other site can have a host's name."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


FROM_ANYWHERE = BrowserRules()
"""The rules of a gateway that serves other machines too, for its own pages alone."""
