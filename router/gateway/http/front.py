"""What a browser, or somebody new, asks first: ``/``, ``/docs`` and ``/v1``."""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse

_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)


def add_front(app: FastAPI) -> None:
    """Add the routes to an app. Their page reads the OpenAPI document, with a key if needed."""

    async def front(request: Request) -> JSONResponse:
        pages = {"documentation": "/docs", "openapi": "/openapi.json", "models": "/v1/models"}
        is_known = request.state.caller is not None
        about = {"version": version("expertmesh")} if is_known else {}
        return JSONResponse({"name": "ExpertMesh", **about, **pages})

    @app.get("/docs")
    async def docs() -> HTMLResponse:
        page = (files("router.gateway.http") / "docs.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    app.add_route("/", front)
    app.add_route("/v1", front)
