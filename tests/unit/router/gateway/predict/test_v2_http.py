"""The protocol over HTTP as curl and plain clients speak it: JSON, paths, encodings, limits."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest

from cluster.errors import InvalidRequestError, UnavailableError
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.gateway.predict.v2_http import Inflater
from tests.unit.gateway_fakes import http_app
from tests.unit.http_calls import OF_JSON, http_server
from tests.unit.prediction_fakes import IDENTITY, LABELS, FakePredictions
from tests.unit.router.gateway.predict.v2_calls import (
    TEXT_UPSTREAM,
    Infer,
    Tensor,
    http_body,
    http_call,
    http_infer,
    tensor,
)

DIGITS = "/v2/models/digits/infer"
PIXELS = [[0, 1, 2, 3.5], [1, 0.25, 0, 0]]


def body(data: Any = PIXELS, **more: Any) -> bytes:
    inputs = [{"name": "pixels", "shape": [2, 4], "datatype": "FP32", "data": data}]
    return json.dumps({"inputs": inputs, **more}).encode()


@pytest.mark.parametrize(
    ("data", "given"), [(PIXELS, {"id": "mine"}), ([v for row in PIXELS for v in row], {})]
)
def test_json_as_curl_sends_it(data: Any, given: dict[str, str]) -> None:
    upstream = FakePredictions()
    response = http_call(DIGITS, body(data, **given), upstream=upstream)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-expertmesh-exact"] == "true"
    assert "inference-header-content-length" not in response.headers
    assert response.json() == {
        "model_name": "digits",
        "model_version": "1",
        **given,
        "parameters": {"exact": True, "identity": IDENTITY},
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [2, 1], "data": list(LABELS[:2])},
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [2, 3],
                "data": [0.0, 6.5, 3.5, 1.0, 0.25, 0.0],
            },
            {"name": "experts", "datatype": "INT64", "shape": [2, 2], "data": [0, -1, 0, -1]},
        ],
    }
    [request] = upstream.requests
    assert request.model == "digits"
    assert request.on_expert_loss == "strict"
    assert 80 < request.remaining_s() < 120


def test_a_parameter_of_mlservers_clients_is_harmless() -> None:
    content = {"parameters": {"content_type": "np"}}
    inputs = [{"name": "pixels", "shape": [2, 4], "datatype": "FP32", "data": PIXELS, **content}]
    sent = json.dumps({"inputs": inputs, **content}).encode()
    assert http_call(DIGITS, sent).status_code == 200
    other = json.dumps({"inputs": inputs, "parameters": {"content_type": "pd"}}).encode()
    assert http_call(DIGITS, other).status_code == 400


def test_a_target_is_needed_for_its_density_alone() -> None:
    pixels = Tensor("pixels", "FP32", (2, 4), b"\0" * 32)
    target = tensor("target", np.ones((2, 1), np.float32))
    mean = http_infer(Infer("density", [pixels], ["mean"]))
    assert [output["name"] for output in mean.json()["outputs"]] == ["mean"]
    for given, names in ([pixels, target], ["mean", "log_density"]), ([pixels], ["mean"]):
        reply = http_infer(Infer("density", given))
        assert [output["name"] for output in reply.json()["outputs"]] == names
    assert http_infer(Infer("density", [pixels], ["log_density"])).status_code == 400


def test_json_refuses_an_infinite_output_and_binary_has_it() -> None:
    zero = [
        Tensor("pixels", "FP32", (1, 4), b"\0" * 16),
        tensor("target", np.zeros((1, 1), np.float32)),
    ]
    response = http_infer(Infer("density", zero))
    assert response.status_code == 500
    assert response.json()["error"] == (
        "outputs.log_density: row 0 has -inf, which JSON cannot represent; "
        "request it with binary_data"
    )
    response = http_infer(Infer("density", zero, parameters={"binary_data_output": True}))
    assert response.content.endswith(np.float32(-np.inf).tobytes())


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/v2/health/live", 200, {"live": True}),
        ("/v2/health/ready", 200, {"ready": True}),
        ("/v2/health/ready", 503, {"ready": False}),
        ("/v2/models/digits/ready", 200, {"name": "digits", "ready": True}),
        ("/v2/models/team/flow/versions/1/ready", 200, {"name": "team/flow", "ready": True}),
        ("/v2/models/team%2Fflow/ready", 200, {"name": "team/flow", "ready": True}),
        ("/v2/models/tiny/ready", 200, {"name": "tiny", "ready": True}),
        ("/v2/models/waves/ready", 503, {"name": "waves", "ready": False}),
        ("/v2/models/nobody/ready", 404, None),
        ("/v2/models/digits/versions/2/ready", 404, None),
        ("/v2/models/digits/versions/2", 404, None),
        ("/v2/models/tiny", 400, None),
        ("/v2/models/nobody", 404, None),
        ("/v2/models/", 404, None),
        ("/v2/anything", 404, None),
        ("/v2/models/digits/infer", 405, None),
    ],
)
def test_paths(path: str, status: int, answer: Mapping[str, Any] | None) -> None:
    upstream = FakePredictions()
    upstream.not_ready.add("waves")
    if (path, status) == ("/v2/health/ready", 503):
        upstream.readiness = Readiness("2 experts have no live copy", (3, 7), 0.25)
    response = http_call(path, upstream=upstream)
    assert response.status_code == status
    if answer is None:
        assert list(response.json()) == ["error"]
        assert isinstance(response.json()["error"], str)
    else:
        assert response.json() == answer


def test_the_wrong_method_is_refused_with_the_right_one() -> None:
    for path, allowed in (("/v2/models/digits", "GET"), ("/v2/models/digits/ready", "GET")):
        response = http_call(path, b"{}")
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert http_call(DIGITS).headers["allow"] == "POST"


def test_language_models_apis_know_no_mixtures() -> None:
    listed = http_call("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "bare"]
    asked = json.dumps({"model": "digits", "prompt": "x"}).encode()
    completed = http_call("/v1/completions", asked, OF_JSON)
    for response in (completed, http_call("/v1/models/digits")):
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "model"
        assert "POST /v2/models/digits/infer" in error["message"]


MANY = Infer("digits", [tensor("pixels", np.ones((100, 4), np.float32))])
PACK: dict[str, tuple[Any, Any]] = {
    "gzip": (gzip.compress, gzip.decompress),
    "deflate": (zlib.compress, zlib.decompress),
}


def raw_call(headers: Mapping[str, str], sent: bytes) -> tuple[httpx.Headers, bytes]:
    """The headers and the body of a reply, as a real server sends them."""
    app = http_app(TEXT_UPSTREAM, predictions=FakePredictions())
    with http_server(app) as port, httpx.Client(timeout=20) as client:
        url = f"http://127.0.0.1:{port}{DIGITS}"
        with client.stream("POST", url, content=sent, headers=headers) as response:
            return response.headers, b"".join(response.iter_raw())


@pytest.mark.parametrize("encoding", PACK)
def test_a_reply_is_compressed_for_a_client_that_accepts_it(encoding: str) -> None:
    sent, headers = http_body(MANY)
    told, plain = raw_call({**headers, "Accept-Encoding": "identity"}, sent)
    assert "content-encoding" not in told
    accepted = {**headers, "Accept-Encoding": f"br, {encoding};q=0.5"}
    told, packed = raw_call(accepted, sent)
    assert told["content-encoding"] == encoding
    assert told["vary"] == "Accept-Encoding"
    assert len(packed) < len(plain) / 4
    assert PACK[encoding][1](packed) == plain


def test_a_small_reply_and_a_refused_encoding_stay_plain() -> None:
    one = Infer("digits", [tensor("pixels", np.ones((1, 4), np.float32))])
    for infer, accepted in ((one, "gzip"), (MANY, "gzip;q=0, br")):
        sent, headers = http_body(infer)
        told, _ = raw_call({**headers, "Accept-Encoding": accepted}, sent)
        assert "content-encoding" not in told


@pytest.mark.parametrize("encoding", PACK)
@pytest.mark.parametrize("damage", ["cut", "noise", "tail", "bomb"])
def test_a_damaged_compressed_body_or_one_that_grows_beyond_the_limit_is_refused(
    encoding: str, damage: str
) -> None:
    sent, headers = http_body(MANY)
    compress, _ = PACK[encoding]
    packed, bomb = compress(sent), compress(b" " * 20_000_000)
    assert len(bomb) < 100_000
    wrong = {"cut": packed[:-5], "noise": b"no" + packed, "tail": packed + b"x", "bomb": bomb}
    response = http_call(DIGITS, wrong[damage], {**headers, "Content-Encoding": encoding})
    assert response.status_code == (413 if damage == "bomb" else 400)
    told = "the body is over the limit of 4194304 bytes"
    if damage != "bomb":
        told = "Content-Encoding: the body is not"
    assert response.json()["error"].startswith(told)


@pytest.mark.parametrize("encoding", PACK)
def test_bytes_after_a_compressed_body_are_refused_at_once_and_not_kept(encoding: str) -> None:
    inflater = Inflater(encoding, 100)
    assert inflater.feed(PACK[encoding][0](b"x")) == b"x"
    with pytest.raises(InvalidRequestError, match="not one complete"):
        inflater.feed(b"y")


def test_an_unknown_encoding_is_refused() -> None:
    response = http_call(DIGITS, b"x", {"Content-Encoding": "br"})
    assert response.status_code == 400
    told = "Content-Encoding: must be gzip, deflate or identity; got 'br'"
    assert response.json()["error"] == told


def test_a_refusal_with_a_hint_has_it_in_a_header() -> None:
    upstream = FakePredictions()
    upstream.error = UnavailableError("the router is not reachable", "", 1.0)
    response = http_call(DIGITS, body(), upstream=upstream)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


@asynccontextmanager
async def connected(
    upstream: FakePredictions, limits: GatewayConfig
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(http_app(TEXT_UPSTREAM, limits, upstream))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def held(upstream: FakePredictions, *posts: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
    """Requests under way, which a cancellation of the task ends."""
    upstream.endless = True
    task = asyncio.gather(*posts)
    while len(upstream.requests) < len(posts):
        await asyncio.sleep(0.01)
    return task


async def test_a_gateway_is_full_over_both_apis() -> None:
    upstream = FakePredictions()
    async with connected(upstream, GatewayConfig(max_ongoing_requests=1)) as client:

        async def text() -> int:
            asked = {"model": "tiny", "prompt": "in"}
            return (await client.post("/v1/completions", json=asked)).status_code

        task = await held(upstream, client.post(DIGITS, content=body()))
        again = await client.post(DIGITS, content=body())
        assert (again.status_code, await text()) == (429, 429)
        assert again.json()["error"] == "the gateway is full: at most 1 concurrent requests"
        task.cancel()
        await asyncio.wait({task})
        assert upstream.cancelled.is_set()
        assert await text() == 200


async def test_bodies_of_requests_under_way_count_until_their_end() -> None:
    sent, headers = http_body(Infer("digits", [Tensor("pixels", "FP32", (40, 4), b"\0" * 640)]))
    upstream = FakePredictions()
    async with connected(upstream, GatewayConfig(max_body_bytes=1024)) as client:
        ask = partial(client.post, DIGITS, content=sent, headers=headers)
        task = await held(upstream, *(ask() for _ in range(16 * 1024 // len(sent))))
        more = await ask()
        assert more.status_code == 429
        assert "bytes of request bodies" in more.json()["error"]
        task.cancel()
        await asyncio.wait({task})
        upstream.endless = False
        assert (await ask()).status_code == 200


def test_a_client_that_leaves_ends_its_request() -> None:
    upstream = FakePredictions()
    upstream.endless = True
    app = http_app(TEXT_UPSTREAM, predictions=upstream)
    with http_server(app) as port, httpx.Client(timeout=0.3) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"http://127.0.0.1:{port}{DIGITS}", content=body())
        assert upstream.cancelled.wait(20)


def test_a_deadline_ends_a_request() -> None:
    upstream = FakePredictions()
    upstream.endless = True
    response = http_call(DIGITS, body(parameters={"timeout_s": 0.05}), upstream=upstream)
    assert response.status_code == 504
    assert response.json()["error"] == "the request timed out before its last row"
    assert upstream.cancelled.is_set()
