"""The path that KubeRay's probes ask, which Ray Serve's proxies answer elsewhere."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

HEALTH_PATH = "/-/healthz"


def probe_app() -> ASGIApp:
    """Return an app that answers this path, and nothing else."""
    return Starlette(routes=[Route(HEALTH_PATH, healthz)])


async def healthz(request: Request) -> Response:
    """Answer that this gateway listens, whether or not there are experts."""
    return PlainTextResponse("success")
