"""Wrong requests for predictions: HTTP and gRPC refuse the same in the same words."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.errors import Code, ExpertMeshError, TooLargeError
from router.config.deployment import GatewayConfig
from router.gateway.predict import validate
from router.gateway.predict.v2_http import LENGTH_HEADER, parse_infer
from router.gateway.predict.validate import MAX_ROWS
from tests.unit.prediction_fakes import FakePredictions
from tests.unit.router.gateway.predict.v2_calls import (
    Infer,
    Tensor,
    grpc_call,
    grpc_infer,
    grpc_message,
    http_body,
    http_call,
    http_infer,
    outcome,
    refusals,
    tensor,
)

PIXELS = np.ones((2, 4), np.float32)
GOOD = Tensor("pixels", "FP32", (2, 4), PIXELS.tobytes())
DIGITS = "/v2/models/digits/infer"


def flow(**changed: Tensor) -> list[Tensor]:
    """All inputs of team/flow for three rows, some of them changed; a ``None`` is left out."""
    inputs = {
        "features": tensor("features", np.ones((3, 2, 3))),
        "site": tensor("site", np.zeros((3, 1), np.int32)),
        "flags": tensor("flags", np.ones((3, 2), bool)),
        "bytes": tensor("bytes", np.ones((3, 1), np.uint8)),
        "counts": tensor("counts", np.ones((3, 1), np.int64)),
        **changed,
    }
    return [given for given in inputs.values() if given is not None]


def digits(shape: tuple[int, ...], data: Any = b"", datatype: str = "FP32") -> Infer:
    """A request with such pixels; a number is that of bytes."""
    sent = bytes(data) if isinstance(data, int) else data
    return Infer("digits", [Tensor("pixels", datatype, shape, sent)])


def having(**parameters: Any) -> Infer:
    return Infer("digits", [GOOD], parameters=parameters)


CASES: dict[str, tuple[Infer, str, str]] = {
    "unknown input": (
        Infer("digits", [GOOD, Tensor("x\x1b", "FP32", (2, 4), b"")]),
        "inputs", "'x\\x1b' is not one of the inputs pixels",
    ),
    "no input": (Infer("digits", []), "inputs.pixels", "is missing"),
    "duplicate input": (Infer("digits", [GOOD, GOOD]), "inputs.pixels", "appears twice"),
    "missing input": (Infer("team/flow", flow(site=None)), "inputs.site", "is missing"),
    "missing target": (
        Infer("density", [GOOD], ["mean", "log_density"]),
        "inputs.target", "is missing; the output log_density needs it",
    ),
    "unknown output": (
        Infer("digits", [GOOD], ["label", "votes"]),
        "outputs", "'votes' is not one of the outputs label, probabilities, experts",
    ),
    "duplicate output": (
        Infer("digits", [GOOD], ["label", "label"]), "outputs.label", "appears twice",
    ),
    "datatype": (digits((2, 4), 64, "FP64"), "inputs.pixels.datatype", "must be FP32; got 'FP64'"),
    "shape": (
        digits((2, 5), 40),
        "inputs.pixels.shape", "must be [-1, 4], where -1 is any length; got [2, 5]",
    ),
    "no rows": (
        digits((0, 4)),
        "inputs.pixels.shape[0]", "must be an integer from 1 to 2147483647; got 0",
    ),
    "a vast shape": (
        digits((2**62, 2**62)),
        "inputs.pixels.shape[0]",
        "must be an integer from 1 to 2147483647; got 4611686018427387904",
    ),
    "too many rows": (
        digits((MAX_ROWS + 1, 4)),
        "inputs.pixels.shape", f"has {MAX_ROWS + 1} rows; at most {MAX_ROWS}",
    ),
    "batch axes": (
        Infer("team/flow", flow(flags=tensor("flags", np.ones((2, 2), bool)))),
        "inputs.flags.shape", "has 2 rows, but features has 3",
    ),
    "too few bytes": (
        digits((2, 4), 31), "inputs.pixels", "has 31 bytes, must have 32: 8 values of FP32",
    ),
    "not finite": (
        digits((2, 4), struct.pack("<8f", *[1.0] * 7, float("nan"))),
        "inputs.pixels", "row 1 has nan; all values must be finite in FP32",
    ),
    "a BOOL of 2": (
        Infer("team/flow", flow(flags=Tensor("flags", "BOOL", (3, 2), b"\0\1\2\0\1\0"))),
        "inputs.flags", "has a byte that is neither 0 nor 1, must be BOOL",
    ),
    "timeout_s": (
        having(timeout_s=0.0), "parameters.timeout_s", "must be greater than 0; got 0.0",
    ),
    "a late timeout_s": (
        having(timeout_s=3601.0),
        "parameters.timeout_s", "must be less than or equal to 3600; got 3601.0",
    ),
    "timeout": (
        having(timeout=-1), "parameters.timeout", "must be greater than or equal to 1; got -1",
    ),
    "both timeouts": (
        having(timeout=5, timeout_s=5.0),
        "parameters.timeout", "cannot be given together with timeout_s",
    ),
    "on_expert_loss": (
        having(on_expert_loss="hope"),
        "parameters.on_expert_loss", "must be 'strict', 'next_expert' or 'drop'; got 'hope'",
    ),
    "a language model": (
        Infer("tiny", [GOOD]), "model",
        "tiny is a language model, which has no tensors; use POST /v1/completions, "
        "POST /v1/chat/completions or expertmesh.v1.Inference/Generate",
    ),
    "an unknown model": (
        Infer("x/y", [GOOD]), "model",
        "'x/y' is not served here; served: digits, team/flow, waves, density, tiny, bare",
    ),
    "an unknown version": (
        Infer("digits", [GOOD], version="2"), "model_version",
        "must be 1, the only version of digits; got '2'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_surfaces_refuse_it_alike(name: str) -> None:
    infer, field, message = CASES[name]
    (status, text), error = refusals(infer)
    assert text == str(error) == f"{field}: {message.removesuffix(' ')}"
    assert (error.field, error.message) == (field, message)
    is_unknown = error.code is Code.NOT_FOUND
    assert status == (404 if is_unknown else 400)
    assert is_unknown or error.code is Code.INVALID_ARGUMENT


def test_a_reply_that_would_be_too_large_is_refused_beforehand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validate, "REPLY_ROOM", 1)
    limits = GatewayConfig(max_body_bytes=8192)

    def asked(rows: int) -> Infer:
        return digits((rows, 4), 16 * rows)

    # A row has a label of at most 4 + 13 bytes, 3 FP32 and 2 INT64: 45 bytes.
    assert http_infer(asked(182), limits=limits).status_code == 200
    assert grpc_infer(asked(182), limits=limits).model_name == "digits"
    (status, text), error = refusals(asked(183), limits)
    assert (status, error.field) == (400, "outputs")
    assert text == str(error)
    assert "the reply for 183 rows has 8235 bytes; at most 8192" in text
    fewer = Infer("digits", asked(183).tensors, ["probabilities"])
    assert http_infer(fewer, limits=limits).status_code == 200


def test_the_bounds_of_bodies_hold_for_predictions() -> None:
    limits = GatewayConfig(max_body_bytes=1024)
    large = digits((100, 4), 1600)
    response = http_infer(large, limits=limits)
    assert response.status_code == 413
    assert response.json() == {"error": "the body is over the limit of 1024 bytes"}
    with pytest.raises(TooLargeError, match="the message is over the limit of 1024 bytes"):
        grpc_infer(large, limits=limits)


INPUT = {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
BODIES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "the body is not JSON: Expecting property name"),
    "no object": ([], "the body must be a JSON object"),
    "no inputs": ({}, "inputs: is missing"),
    "inputs that are no list": ({"inputs": {}}, "inputs: must be a list; got a mapping of 0"),
    "an unknown field": ({"inputs": [INPUT], "in\nput": 1}, "'in\\nput': unknown field; allowed"),
    "an unknown field of an input": (
        {"inputs": [{**INPUT, "dtype": "FP32"}]}, "inputs[0].dtype: unknown field; allowed: data",
    ),
    "half a character": (
        {"inputs": [{**INPUT, "name": "\ud800"}]}, "inputs[0].name: character 0 is half of",
    ),
    "no data": ({"inputs": [{**INPUT, "data": None}]}, "inputs[0].data: is missing"),
    "a datatype that is no text": (
        {"inputs": [{**INPUT, "datatype": ["FP32"]}]},
        "inputs.pixels.datatype: must be FP32; got a list of 1",
    ),
    "an id that is no text": ({"inputs": [INPUT], "id": 4}, "id: must be a valid string; got 4"),
    "shared memory": (
        {"inputs": [{**INPUT, "parameters": {"shared_memory_region": "x"}}]},
        "inputs[0].parameters.shared_memory_region: unknown field; allowed: binary_data_size",
    ),
    "an odd name of a parameter": (
        {"inputs": [INPUT], "parameters": {"\u0000 a.b": 1}},
        "parameters.'\\x00 a.b': unknown field; allowed: binary_data_output, content_type, "
        "on_expert_loss, timeout, timeout_s",
    ),
    "a size beside data": (
        {"inputs": [{**INPUT, "parameters": {"binary_data_size": 0}}]},
        "inputs[0].data: cannot be given together with binary_data_size",
    ),
    "a size without bytes": (
        {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 4],
                     "parameters": {"binary_data_size": 16}}]},
        "inputs[0].parameters.binary_data_size: must be at most 0, the bytes left after the",
    ),
    "binary_data": (
        {"inputs": [INPUT], "outputs": [{"name": "label", "parameters": {"binary_data": 1}}]},
        "outputs[0].parameters.binary_data: must be a valid boolean; got 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_refused_with_its_place(name: str) -> None:
    body, message = BODIES[name]
    upstream = FakePredictions()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http_call(DIGITS, data, upstream=upstream)
    assert response.status_code == 400
    assert response.json()["error"].startswith(message)
    assert upstream.requests == []


WRONG_LENGTH = f"{LENGTH_HEADER}: must be from 1 to the body's "


@pytest.mark.parametrize(
    ("length", "message"),
    [
        *((length, WRONG_LENGTH) for length in ("", "0", "-1", "1e2", "99999", "9" * 30)),
        ("10", "the body is not JSON: "),
        (None, "the body is not JSON: it cannot be decoded"),
    ],
)
def test_the_length_of_the_json_is_checked(length: str | None, message: str) -> None:
    body, _ = http_body(digits((1, 4), b"\xff" * 16))
    headers = {} if length is None else {LENGTH_HEADER: length}
    response = http_call(DIGITS, body, headers)
    assert response.status_code == 400
    assert response.json()["error"].startswith(message)


def test_bytes_that_no_input_has_are_refused() -> None:
    body, headers = http_body(digits((1, 4), 16))
    response = http_call(DIGITS, body + b"!", headers)
    assert response.json()["error"] == (
        "inputs: 17 bytes follow the JSON, but the inputs' binary_data_size adds up to 16"
    )


GRPC: dict[str, tuple[Callable[[Any], object], str]] = {
    "too few raw entries": (
        lambda m: m.inputs.add(name="x"),
        "raw_input_contents: has 1 entries; must have one for each of the 2 inputs",
    ),
    "raw beside typed": (
        lambda m: m.inputs[0].contents.fp32_contents.append(1),
        "inputs[0].contents: cannot be given together with raw_input_contents",
    ),
    "another field": (
        lambda m: (m.ClearField("raw_input_contents"),
                   m.inputs[0].contents.fp64_contents.append(1)),
        "inputs[0].contents.fp64_contents: is not the field for 'FP32', which is fp32_contents",
    ),
    "no contents": (
        lambda m: m.ClearField("raw_input_contents"),
        "inputs.pixels: data has 0 values; its shape needs 8",
    ),
    "a parameter without a value": (
        lambda m: m.parameters["timeout_s"].Clear(),
        "parameters.timeout_s: must be a valid number; got a InferParameter",
    ),
    "classification": (
        lambda m: setattr(m.outputs.add(name="label").parameters["classification"],
                          "int64_param", 2),
        "outputs[0].parameters.classification: unknown field; allowed: content_type",
    ),
    "an unknown parameter": (
        lambda m: setattr(m.parameters["priority"], "int64_param", 1),
        "parameters.priority: unknown field; allowed: content_type, on_expert_loss, timeout, "
        "timeout_s",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRPC)
def test_a_malformed_message_is_refused_with_its_place(name: str) -> None:
    change, message = GRPC[name]
    request = grpc_message(Infer("digits", [GOOD]))
    change(request)
    with pytest.raises(ExpertMeshError) as caught:
        grpc_call("ModelInfer", request.SerializeToString())
    assert str(caught.value) == message
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_bytes_that_are_no_message_are_refused() -> None:
    for method in ("ModelInfer", "ModelMetadata", "ModelReady"):
        with pytest.raises(ExpertMeshError, match=f"not a inference.{method}Request message"):
            grpc_call(method, b"\xff\xff")


WHOLE, HEADERS = http_body(
    Infer("digits", [GOOD], ["label", "experts"], {"timeout_s": 3, "binary_data_output": True})
)
MESSAGE = grpc_message(Infer("digits", [GOOD], ["label"], {"timeout_s": 3.0})).SerializeToString()


def mutated(data: st.DataObject, whole: bytes) -> bytes:
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        end = min(len(changed), start + data.draw(st.integers(0, 4)))
        changed[start:end] = data.draw(st.binary(max_size=4))
    return bytes(changed)


@settings(max_examples=300)
@given(st.data())
def test_a_mutated_body_is_parsed_or_refused(data: st.DataObject) -> None:
    body = mutated(data, WHOLE)
    length = data.draw(st.sampled_from([HEADERS[LENGTH_HEADER], str(len(body)), None, "7"]))
    parsed = outcome(lambda: parse_infer(body, length, GatewayConfig()))
    if isinstance(parsed, ExpertMeshError):
        assert parsed.code is Code.INVALID_ARGUMENT


@settings(max_examples=300)
@given(st.data())
@example(None)
def test_a_mutated_message_is_answered_or_refused(data: st.DataObject | None) -> None:
    message = MESSAGE if data is None else mutated(data, MESSAGE)
    reply = outcome(lambda: grpc_call("ModelInfer", message))
    if isinstance(reply, ExpertMeshError):
        assert reply.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND)
    else:
        assert reply.model_name == "digits"
