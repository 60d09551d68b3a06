"""The Open Inference Protocol over HTTP: the routes under ``/v2``.

A body is a JSON object. With the header ``Inference-Header-Content-Length``, binary tensors follow
it (the binary tensor extension), and the header has the length of the JSON.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import InvalidRequestError, TooLargeError, shown
from cluster.spec import EXACT_HEADER
from router.config.deployment import GatewayConfig
from router.gateway.http_io import parse_json, read_body, until_disconnect
from router.gateway.input.request import base
from router.gateway.limits.room import Share
from router.gateway.predict.body import InferInput, InferRequest, body_within
from router.gateway.predict.service import (
    EXTENSIONS,
    SERVER_NAME,
    SERVER_VERSION,
    PredictionService,
    metadata_of,
)
from router.gateway.predict.validate import (
    VERSION,
    CheckedPrediction,
    RawTensor,
    json_list,
)
from router.messages.prediction import PredictionReply
from router.messages.tensor_bytes import bytes_of

FIELD = "Content-Encoding"
MIN_COMPRESSED_BYTES = 1024
"""A smaller reply is not compressed: it would hardly become smaller."""
_LEVEL = 1
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
LENGTH_HEADER = "Inference-Header-Content-Length"
_MODEL_PATH = re.compile(
    r"(?P<model>.+?)(?:/versions/(?P<version>[^/]+))?(?:/(?P<verb>ready|infer))?", re.DOTALL
)


class Inflater:
    """Undoes the compression of one body, piece by piece, up to a limit."""

    def __init__(self, encoding: str, limit_bytes: int) -> None:
        """Raises :class:`InvalidRequestError` for an encoding that is not known."""
        if encoding not in _WINDOWS:
            raise InvalidRequestError(
                f"must be {', '.join(_WINDOWS)} or identity; got {shown(encoding)}", FIELD
            )
        self._encoding = encoding
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._stream = zlib.decompressobj(_WINDOWS[encoding])
        self._incomplete = InvalidRequestError(
            f"the body is not one complete {encoding} stream", FIELD
        )

    def feed(self, piece: bytes) -> bytes:
        """Return the bytes of a piece.

        Raises :class:`TooLargeError` beyond the limit, before memory is taken for more, and
        :class:`InvalidRequestError` for damaged bytes, and for bytes after the body's end.
        """
        room = self._limit_bytes - self._num_bytes
        try:
            data = self._stream.decompress(piece, room + 1)
        except zlib.error:
            raise InvalidRequestError(f"the body is not {self._encoding}", FIELD) from None
        if self._stream.unused_data:  # zlib would keep all that comes
            raise self._incomplete
        if len(data) > room:
            raise TooLargeError(f"the body is over the limit of {self._limit_bytes} bytes")
        self._num_bytes += len(data)
        return data

    def finish(self) -> None:
        """Raise :class:`InvalidRequestError` unless the compressed body has ended."""
        if not self._stream.eof:
            raise self._incomplete


def accepted_encoding(accept: str) -> str | None:
    """Return the first encoding of an ``Accept-Encoding`` that a reply may have, or ``None``."""
    for part in accept.lower().split(","):
        encoding, _, quality = part.partition(";")
        name, is_accepted = encoding.strip(), quality.replace(" ", "") not in ("q=0", "q=0.0")
        if name in _WINDOWS and is_accepted:
            return name
    return None


async def compressed(body: bytes, encoding: str) -> bytes:
    """Return a body in an encoding; other requests go on meanwhile."""
    if encoding == "gzip":
        return await asyncio.to_thread(gzip.compress, body, _LEVEL, mtime=0)
    return await asyncio.to_thread(zlib.compress, body, _LEVEL)


def add_v2_routes(app: FastAPI, service: PredictionService) -> None:
    """Add all routes under ``/v2`` to an app."""

    async def server(request: Request) -> Response:
        extensions = list(EXTENSIONS)
        return JSONResponse(
            {"name": SERVER_NAME, "version": SERVER_VERSION, "extensions": extensions}
        )

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        is_ready = service.ready().is_ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def models(request: Request) -> Response:
        return JSONResponse({"models": sorted(service.validator.mixtures)})

    async def model(request: Request) -> Response:
        match = _MODEL_PATH.fullmatch(request.path_params["path"])
        if match is None:
            raise HTTPException(404)
        model_id, version, verb = match["model"], match["version"] or "", match["verb"]
        is_post = request.method == "POST"
        if is_post != (verb == "infer"):
            raise HTTPException(405, headers={"Allow": "POST" if verb == "infer" else "GET"})
        if is_post:
            return await _infer(request, service, model_id, version)
        if verb == "ready":
            is_ready = service.model_ready(model_id, version)
            return JSONResponse({"name": model_id, "ready": is_ready}, 200 if is_ready else 503)
        return JSONResponse(metadata_of(service.validator.mixture(model_id, version)))

    app.add_route("/v2", server)
    app.add_route("/v2/health/live", live)
    app.add_route("/v2/health/ready", ready)
    app.add_route("/v2/models", models)
    app.add_route("/v2/models/{path:path}", model, methods=["GET", "POST"])


async def _infer(
    request: Request, service: PredictionService, model_id: str, version: str
) -> Response:
    # The arrays of a request are views of its body, so the body's share lasts as long.
    with service.room.bodies.share_of(request.state.caller.name) as share:
        with service.metrics.refusals("http"):
            service.validator.mixture(model_id, version)
            body = await _read(request, service.limits.max_body_bytes, share)
            length = request.headers.get(LENGTH_HEADER)
            inputs, asked = parse_infer(body, length, service.limits)
            outputs = [output.name for output in asked.outputs]
            checked = service.validator.check(model_id, version, inputs, outputs, asked.parameters)

        def encode(reply: PredictionReply) -> EncodedReply:
            return encoded_reply(asked, checked, reply)

        work = service.predict(checked, request.state.caller, "http", encode)
        return await _response(request, await until_disconnect(request.receive, work))


async def _read(request: Request, max_bytes: int, share: Share) -> bytes:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return await read_body(request, max_bytes, share)
    inflater = Inflater(encoding, max_bytes)
    inflated: list[bytes] = []

    def inflate(piece: bytes) -> None:
        inflated.append(inflater.feed(piece))
        share.take(len(inflated[-1]))

    await read_body(request, max_bytes, share, inflate)
    inflater.finish()
    return b"".join(inflated)


def parse_infer(
    body: bytes, header_length: str | None, limits: GatewayConfig
) -> tuple[list[RawTensor], InferRequest]:
    """Return the unchecked inputs of a body, and its other fields.

    ``header_length`` is the value of the header, if it is there. Raises
    :class:`InvalidRequestError` with the place of what is wrong.
    """
    text, rest = _split(body, header_length)
    asked = base.read(body_within(limits), parse_json(text))
    inputs, taken = [], 0
    for place, tensor in enumerate(asked.inputs):
        data = _data(tensor, f"inputs[{place}]", rest[taken:])
        taken += tensor.parameters.binary_data_size or 0
        inputs.append(RawTensor(tensor.name, tensor.datatype, tensor.shape, data))
    if taken != len(rest):
        raise InvalidRequestError(
            f"{len(rest)} bytes follow the JSON, but the inputs' binary_data_size adds up to "
            f"{taken}",
            "inputs",
        )
    return inputs, asked


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """Return the JSON and the bytes after it."""
    if header_length is None:
        return body, memoryview(b"")
    is_number = header_length.isascii() and header_length.isdecimal() and len(header_length) < 20
    if not is_number or not 0 < int(header_length) <= len(body):
        raise InvalidRequestError(
            base.wrong(header_length, f"from 1 to the body's {len(body)} bytes"), LENGTH_HEADER
        )
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _data(tensor: InferInput, where: str, rest: memoryview) -> list[Any] | memoryview:
    """Return an input's values, or its bytes at the beginning of ``rest``."""
    size, data = tensor.parameters.binary_data_size, tensor.data
    if size is None:
        if data is None:
            raise InvalidRequestError("is missing", f"{where}.data")
        return data
    if data is not None:
        raise InvalidRequestError("cannot be given together with binary_data_size", f"{where}.data")
    if size > len(rest):
        raise InvalidRequestError(
            f"must be at most {len(rest)}, the bytes left after the JSON, whose length is in "
            f"{LENGTH_HEADER}; got {size}",
            f"{where}.parameters.binary_data_size",
        )
    return rest[:size]


@dataclass(frozen=True, slots=True)
class EncodedReply:
    """A reply's body, which begins with ``json_bytes`` of JSON."""

    body: bytes
    json_bytes: int
    exact: bool


async def _response(request: Request, reply: EncodedReply) -> Response:
    body = reply.body
    headers = {EXACT_HEADER: str(reply.exact).lower(), "Vary": "Accept-Encoding"}
    media_type = "application/json"
    if reply.json_bytes < len(body):
        headers[LENGTH_HEADER] = str(reply.json_bytes)
        media_type = "application/octet-stream"
    encoding = accepted_encoding(request.headers.get("Accept-Encoding", ""))
    if encoding is not None and len(body) >= MIN_COMPRESSED_BYTES:
        body = await compressed(body, encoding)
        headers["Content-Encoding"] = encoding
    return Response(body, headers=headers, media_type=media_type)


def encoded_reply(
    asked: InferRequest, checked: CheckedPrediction, reply: PredictionReply
) -> EncodedReply:
    """Return a reply as its client asked for it."""
    outputs, binaries = [], []
    is_binary = {output.name: output.parameters.binary_data for output in asked.outputs}
    for output in checked.outputs():
        array = reply.outputs[output.name]
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(array.shape),
        }
        chosen = is_binary.get(output.name)
        if asked.parameters.binary_data_output if chosen is None else chosen:
            binaries.append(bytes_of(array))
            tensor["parameters"] = {"binary_data_size": len(binaries[-1])}
        else:
            tensor["data"] = json_list(array, f"outputs.{output.name}")
        outputs.append(tensor)
    answer: dict[str, Any] = {
        "model_name": checked.mixture.id,
        "model_version": VERSION,
        "parameters": {"exact": reply.exact, "identity": reply.identity},
        "outputs": outputs,
    }
    if asked.id is not None:
        answer["id"] = asked.id
    text = json.dumps(answer, allow_nan=False).encode()
    return EncodedReply(b"".join((text, *binaries)), len(text), reply.exact)
