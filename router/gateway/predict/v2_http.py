"""The Open Inference Protocol over HTTP: the routes under ``/v2``.

A body is a JSON object. With the header ``Inference-Header-Content-Length``, binary tensors follow
it (the binary tensor extension), and the header has the length of the JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import InvalidRequestError, shown_name
from cluster.spec import EXACT_HEADER
from router.gateway.http_io import parse_json, read_body, until_disconnect
from router.gateway.input import checks
from router.gateway.limits.room import Share
from router.gateway.predict.compression import (
    MIN_COMPRESSED_BYTES,
    Inflater,
    accepted_encoding,
    compressed,
)
from router.gateway.predict.service import (
    EXTENSIONS,
    SERVER_NAME,
    SERVER_VERSION,
    PredictionService,
    metadata_of,
)
from router.gateway.predict.tensors import RawTensor, json_list
from router.gateway.predict.validate import (
    VERSION,
    CheckedPrediction,
    RawPrediction,
    check_parameters,
)
from router.messages.prediction import PredictionReply
from router.messages.tensor_bytes import bytes_of

LENGTH_HEADER = "Inference-Header-Content-Length"
_MODEL_PATH = re.compile(
    r"(?P<model>.+?)(?:/versions/(?P<version>[^/]+))?(?:/(?P<verb>ready|infer))?", re.DOTALL
)
_REQUEST_FIELDS = frozenset({"id", "parameters", "inputs", "outputs"})
_INPUT_FIELDS = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT_FIELDS = frozenset({"name", "parameters"})


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed body: the request for both surfaces, and the parts that HTTP alone has.

    ``id`` is the client's, or ``None``. ``binary`` has the requested outputs whose form the client
    chose; others are binary where ``is_binary``.
    """

    raw: RawPrediction
    id: str | None
    binary: Mapping[str, bool]
    is_binary: bool


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
            parsed = parse_infer(model_id, version, body, length)
            checked = service.validator.check(parsed.raw)

        def encode(reply: PredictionReply) -> EncodedReply:
            return encoded_reply(parsed, checked, reply)

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
    model_id: str, version: str, body: bytes, header_length: str | None
) -> InferRequest:
    """Take a body apart; ``header_length`` is the value of the header, if it is there.

    Raises :class:`InvalidRequestError` with the place of what is wrong.
    """
    text, rest = _split(body, header_length)
    given = parse_json(text)
    _check_fields(given, _REQUEST_FIELDS, "")
    request_id = given.get("id")
    if request_id is not None:
        request_id = checks.text(request_id, "id")
    parameters = _mapping(given.get("parameters"), "parameters")
    is_binary = checks.boolean(
        parameters.pop("binary_data_output", False), "parameters.binary_data_output"
    )
    inputs, taken = [], 0
    for place, tensor in enumerate(_list(given.get("inputs"), "inputs")):
        raw, size = _input(tensor, f"inputs[{place}]", rest, taken)
        inputs.append(raw)
        taken += size
    if taken != len(rest):
        raise InvalidRequestError(
            f"{len(rest)} bytes follow the JSON, but the inputs' binary_data_size adds up to "
            f"{taken}",
            "inputs",
        )
    outputs, binary = _outputs(given.get("outputs"))
    raw_request = RawPrediction(model_id, version, inputs, outputs, parameters)
    return InferRequest(raw_request, request_id, binary, is_binary)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """Return the JSON and the bytes after it."""
    if header_length is None:
        return body, memoryview(b"")
    is_number = header_length.isascii() and header_length.isdecimal() and len(header_length) < 20
    if not is_number or not 0 < int(header_length) <= len(body):
        raise InvalidRequestError(
            checks.wrong(header_length, f"from 1 to the body's {len(body)} bytes"), LENGTH_HEADER
        )
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _input(tensor: Any, where: str, rest: memoryview, start: int) -> tuple[RawTensor, int]:
    """Return an input, and the bytes that it has of ``rest`` from ``start`` on."""
    given = _mapping(tensor, where)
    _check_fields(given, _INPUT_FIELDS, f"{where}.")
    name = checks.text(given.get("name"), f"{where}.name")
    shape = _list(given.get("shape"), f"{where}.shape")
    parameters = _mapping(given.get("parameters"), f"{where}.parameters")
    check_parameters(parameters, ("binary_data_size",), f"{where}.parameters")
    if "binary_data_size" not in parameters:
        data = _list(given.get("data"), f"{where}.data")
        return RawTensor(name, given.get("datatype"), shape, data), 0
    if "data" in given:
        raise InvalidRequestError("cannot be given together with binary_data_size", f"{where}.data")
    field = f"{where}.parameters.binary_data_size"
    size = checks.integer(parameters["binary_data_size"], field, 0, 2**63 - 1)
    if size > len(rest) - start:
        raise InvalidRequestError(
            f"given {size}, but {len(rest) - start} bytes are left after the JSON, whose length "
            f"is in {LENGTH_HEADER}",
            field,
        )
    return RawTensor(name, given.get("datatype"), shape, rest[start : start + size]), size


def _outputs(given: Any) -> tuple[list[str], dict[str, bool]]:
    """Return the names of the requested outputs, and whether they are binary where it is said."""
    names: list[str] = []
    binary: dict[str, bool] = {}
    if given is None:
        return names, binary
    for place, tensor in enumerate(_list(given, "outputs")):
        where = f"outputs[{place}]"
        output = _mapping(tensor, where)
        _check_fields(output, _OUTPUT_FIELDS, f"{where}.")
        names.append(checks.text(output.get("name"), f"{where}.name"))
        parameters = _mapping(output.get("parameters"), f"{where}.parameters")
        check_parameters(parameters, ("binary_data",), f"{where}.parameters")
        if "binary_data" in parameters:
            field = f"{where}.parameters.binary_data"
            binary[names[-1]] = checks.boolean(parameters["binary_data"], field)
    return names, binary


def _check_fields(given: Mapping[str, Any], known: frozenset[str], prefix: str) -> None:
    for name in given:
        if name not in known:
            allowed = ", ".join(sorted(known))
            raise InvalidRequestError(
                f"unknown field; allowed: {allowed}", f"{prefix}{shown_name(name)}"
            )


def _mapping(given: Any, where: str) -> dict[str, Any]:
    """Return a copy of a JSON object; an absent one is empty."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidRequestError(checks.wrong(given, "a JSON object"), where)
    return dict(given)


def _list(given: Any, where: str) -> list[Any]:
    if given is None:
        raise InvalidRequestError("is missing", where)
    if not isinstance(given, list):
        raise InvalidRequestError(checks.wrong(given, "a list"), where)
    return given


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
    parsed: InferRequest, checked: CheckedPrediction, reply: PredictionReply
) -> EncodedReply:
    """Return a reply as its client asked for it."""
    outputs, binaries = [], []
    for output in checked.outputs():
        array = reply.outputs[output.name]
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(array.shape),
        }
        if parsed.binary.get(output.name, parsed.is_binary):
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
    if parsed.id is not None:
        answer["id"] = parsed.id
    text = json.dumps(answer, allow_nan=False).encode()
    return EncodedReply(b"".join((text, *binaries)), len(text), reply.exact)
