"""The edge of HTTP: who may ask, JSON bodies, server-sent events, clients that have left."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import (
    CancelledRequestError,
    ExpertMeshError,
    ForbiddenError,
    InvalidRequestError,
    MediaTypeError,
    TooLargeError,
    shown,
)
from router.gateway.errors import http_error, public_error, v2_error
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import Share, arrival_timeout
from router.gateway.metrics import http_request_id
from router.observability.tracing import continue_trace
from router.security.access import FIELD, Access
from router.security.keys import Caller, Role

logger = logging.getLogger(__name__)

HEALTH_PATH = "/-/healthz"
"""What KubeRay's probes ask, which Ray Serve's proxies answer elsewhere."""
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
OPEN_PATHS = frozenset({HEALTH_PATH, "/health", "/ready", "/", "/docs"})
"""Asked without a key by load balancers and newcomers. Without one they have no details."""
ROLES = {"/metrics": Role.METRICS}
"""The role that a path needs; every other path needs :attr:`Role.INFERENCE`."""
T = TypeVar("T")
JSON = "application/json"
OF_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
"""The types of bodies that a browser sends to any site without asking it."""


def is_v2(path: str) -> bool:
    """Return whether a path is one of the Open Inference Protocol."""
    return path == "/v2" or path.startswith("/v2/")


def error_response(error: ExpertMeshError, path: str) -> JSONResponse:
    """Return the response for an error, in the shape of the API that ``path`` belongs to."""
    status, body, headers = v2_error(error) if is_v2(path) else http_error(error)
    return JSONResponse(body, status, headers)


async def read_body(
    request: Request,
    max_bytes: int,
    share: Share,
    consume: Callable[[bytes], None] | None = None,
) -> bytes:
    """Return the body, for which ``share`` takes bytes as they come.

    With ``consume`` each piece goes there, and nothing is kept. Raises :class:`TooLargeError`
    beyond ``max_bytes`` (before the body is read if its content-length says so),
    ``OverloadedError`` if the budget of ``share`` is used up, and :class:`SlowBodyError` where the
    body comes too slowly.
    """
    length = request.headers.get("content-length", "")
    stated_bytes = int(length[:20]) if length.isdecimal() else max_bytes
    too_large = TooLargeError(f"the body is over the limit of {max_bytes} bytes")
    if stated_bytes > max_bytes:
        raise too_large
    body, num_bytes = bytearray(), 0
    async with arrival_timeout("body", stated_bytes):
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise too_large
            if consume is None:
                share.take(len(piece))
                body += piece
            else:
                consume(piece)
    return bytes(body)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; raises :class:`InvalidRequestError` for anything else."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be decoded"
        raise InvalidRequestError(f"the body is not JSON: {reason}") from None
    if not isinstance(parsed, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return parsed


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``, or cancel it when the client leaves.

    The request's body must have been read. Raises ``CancelledRequestError`` on disconnect.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CancelledRequestError("the client disconnected")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class SseResponse(Response):
    """Sends each item of a generator as one server-sent event, and ``[DONE]`` at the end.

    An error midway is sent as an event ``{"error": …}``. When the client goes away the generator
    is closed at once, not when the garbage collector finds it.
    """

    def __init__(
        self, events: AsyncGenerator[dict[str, Any], None], source: AsyncGenerator[Any, None]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        # Closed too: closing a generator that never began runs none of its code.
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the ASGI interface."""
        try:
            await until_disconnect(receive, self._send(send))
        except CancelledRequestError:
            logger.debug("a client disconnected in the middle of a stream")
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await _send_event(send, json.dumps(event))
        except Exception as error:
            if not isinstance(error, ExpertMeshError):
                logger.exception("a stream failed")
            await _send_event(send, json.dumps(http_error(public_error(error))[1]))
        await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


class EdgeMiddleware:
    """Gives each request an id (``X-Request-Id``) and a caller, and lets no exception out.

    A well-formed id of the client's own is kept, and the reply has it. A request that ``browsers``
    or ``access`` refuse goes no further. ``request.state.caller`` is ``None`` for a request without
    a key of a path that needs none. A caller is charged for a POST before its body is read. Each
    reply has the headers of its caller's rates, as they are when it begins. An exception becomes a
    500 without details; the log has them.
    """

    def __init__(
        self,
        app: ASGIApp,
        browsers: BrowserRules,
        access: Access,
        charges: Charges,
    ) -> None:
        self._app = app
        self._browsers = browsers
        self._access = access
        self._charges = charges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; the ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        http_request_id.set(request_id)
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                rates = self._charges.headers(state.get("caller"))
                own = (REQUEST_ID_HEADER.encode(), request_id.encode())
                message["headers"] = [*message["headers"], *rates, own]
            await send(message)

        try:
            path = str(scope["path"])
            self._browsers.check(scope["method"], path, headers)
            state["caller"] = caller = await self._caller(path, headers)
            if caller is not None and scope["method"] == "POST":
                self._charges.begin(caller)
                continue_trace(headers)
            if scope["method"] == "HEAD":  # answered as GET is; the listener leaves the body out
                scope = {**scope, "method": "GET"}
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if not isinstance(error, ExpertMeshError):  # handlers answer what routes raise
                logger.exception("request %s failed", request_id)
            if not has_started:
                await error_response(public_error(error), scope["path"])(
                    scope, receive, send_with_headers
                )

    async def _caller(self, path: str, headers: Headers) -> Caller | None:
        given = headers.getlist(FIELD)
        if path not in OPEN_PATHS:
            return await self._access.admit("http", given, ROLES.get(path, Role.INFERENCE))
        if given or self._access.is_open:
            return await self._access.admit("http", given, None)
        return None


@dataclass(frozen=True, slots=True)
class BrowserRules:
    """Which hosts and origins requests may name.

    They keep pages of other sites from using a gateway through their visitor's browser. A page may
    send requests to this machine's ports, and one whose name changes to this machine's address (DNS
    rebinding) may read the answers. Browsers tell the page's origin and the host's name, and ask
    before they send a type of body that no form has.

    ``is_local`` is whether the gateway serves only this machine: ``Host`` is then ``localhost``,
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
"""The rules of a gateway that serves other machines too, only for its own pages."""


async def healthz(request: Request) -> Response:
    """Answer that this gateway listens, whether or not there are experts."""
    return PlainTextResponse("success")
