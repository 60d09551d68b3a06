"""The OpenAPI document: it has the app's routes and the validation's fields, and no others."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from starlette.routing import Route

from router.config.deployment import GatewayConfig
from router.gateway.http.openapi.document import BODIES
from router.gateway.input.request.model import Request
from tests.unit.gateway_fakes import FakeUpstream, http_app, says
from tests.unit.http_calls import CHAT, COMPLETIONS, HELLO, call, events, refusal
from tests.unit.router.gateway.input.tools.chat_models import says as says_of
from tests.unit.router.gateway.input.tools.test_parsers import QWEN_CALL
from tests.unit.router.gateway.input.tools.test_refusals import CALL, TOOL, USER, post

UPSTREAM = FakeUpstream(says(" was"))
INFER = "/v2/models/digits/infer"
PIXELS = {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = call(UPSTREAM, "/openapi.json").json()
    return found


def validator(document: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    schema = document["components"]["schemas"][name] | {"components": document["components"]}
    return jsonschema.Draft202012Validator(schema)


def test_every_route_is_described_and_no_other(document: dict[str, Any]) -> None:
    routes = {
        (re.sub(r"{(\w+?)(_id)?(:path)?}", r"{\1}", route.path), method.lower())
        for route in http_app(UPSTREAM).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(path, method) for path in document["paths"] for method in document["paths"][path]}
    described = {(path, method) for path, method in described if method != "parameters"}
    # One route has all of a model's paths, since an id may have slashes.
    of_models = {pair for pair in described if pair[0].startswith("/v2/models/")}
    routes -= {("/v2/models/{path}", "get"), ("/v2/models/{path}", "post")}
    routes.remove(("/-/healthz", "get"))  # for a probe of the process, not for clients
    assert described - of_models == routes
    assert len(of_models) == 6


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_has_the_validations_fields(document: dict[str, Any], kind: type[Request]) -> None:
    described = document["components"]["schemas"][kind.__name__]["properties"]
    assert described.keys() == kind.names | kind.others.keys()
    for field, values in kind.others.items():
        check = validator(document, kind.__name__)
        wrong = [error for error in check.iter_errors({field: "nonsense"}) if error.path]
        assert bool(wrong) == (values is not None), field


@pytest.mark.parametrize(
    ("name", "field"),
    [("InferRequest", ""), ("InferInput", "inputs[0]."), ("InferOutput", "outputs[0].")],
)
def test_a_prediction_has_the_validations_fields(
    document: dict[str, Any], name: str, field: str
) -> None:
    described = document["components"]["schemas"][name]["properties"]
    body: dict[str, Any] = {"inputs": [dict(PIXELS)], "outputs": [{"name": "label"}]}
    part = body if not field else body[field.partition("[")[0]][0]
    part["nonsense"] = 1
    told = call(UPSTREAM, INFER, body).json()["error"]
    assert told.startswith(f"{field}nonsense: ")
    allowed = told.rpartition("allowed: ")[2].split(", ")
    assert set(described) == set(allowed)


def infer(fields: dict[str, Any], **body: Any) -> int:
    return call(UPSTREAM, INFER, {"inputs": [fields], **body}).status_code


def test_parameters_of_a_prediction_are_the_validations(document: dict[str, Any]) -> None:
    check = validator(document, "InferRequest")
    good: dict[str, Any] = {"timeout_s": 5, "on_expert_loss": "drop", "binary_data_output": False}
    for parameters in (good, {"timeout": 9_000_000, "content_type": "np"}, {"timeout_s": None}):
        check.validate({"inputs": [PIXELS], "parameters": parameters})
        assert infer(PIXELS, parameters=parameters) == 200
    for parameters in ({"content_type": "pd"}, {"timeout": 3_600_000_001}, {"timeout_s": 3601}):
        assert not check.is_valid({"inputs": [PIXELS], "parameters": parameters})
        assert infer(PIXELS, parameters=parameters) == 400


def test_an_input_has_values_either_in_json_or_after_it(document: dict[str, Any]) -> None:
    check, bare = validator(document, "InferInput"), {**PIXELS}
    del bare["data"]
    size, of_numpy = (
        {"parameters": {"binary_data_size": 16}},
        {"parameters": {"content_type": "np"}},
    )
    assert all(check.is_valid(good) for good in (PIXELS, PIXELS | of_numpy, bare | size))
    for wrong in (bare, PIXELS | size, bare | of_numpy):
        assert not check.is_valid(wrong)
        assert infer(wrong) == 400


@pytest.mark.parametrize(
    ("path", "taken", "answered", "body"),
    [
        (COMPLETIONS, "CompletionRequest", "Completion", {"prompt": "in", "logprobs": 1, "n": 2}),
        (CHAT, "ChatRequest", "Chat", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
        ("/tokenize", "TokenizeRequest", "Tokenized", {"prompt": "in", "return_token_strs": True}),
        ("/detokenize", "DetokenizeRequest", "Detokenized", {"tokens": [5]}),
    ],
)
def test_no_schema_takes_what_is_not_there(
    document: dict[str, Any], path: str, taken: str, answered: str, body: dict[str, Any]
) -> None:
    """test_requests.py has what each of them takes."""
    body = {"model": "tiny", **body}
    for name, good in ((taken, body), (answered, call(UPSTREAM, path, body).json())):
        assert validator(document, name).is_valid(good)
        assert not validator(document, name).is_valid(good | {"nonsense": 1})


def test_bounds_are_those_of_the_deployment() -> None:
    limits = GatewayConfig(max_choices=3, max_timeout_s=7, default_timeout_s=7, max_logprobs=4)
    schemas = call(UPSTREAM, "/openapi.json", limits=limits).json()["components"]["schemas"]
    given = schemas["CompletionRequest"]["properties"]
    assert given["n"]["anyOf"][0]["maximum"] == 3
    assert given["timeout_s"]["anyOf"][0]["maximum"] == 7
    assert given["prompt_logprobs"]["anyOf"][0]["maximum"] == 4
    assert given["model"]["enum"] == ["tiny", "bare"]
    for name, value, param in (("n", 4, "n"), ("timeout_s", 8, "timeout_s")):
        body = {"model": "tiny", "prompt": "in", name: value}
        refusal(call(UPSTREAM, COMPLETIONS, body, limits=limits), 400, param)


def test_every_schema_is_one_and_every_reference_is_there(document: dict[str, Any]) -> None:
    components = document["components"]
    for schema in components["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = set(re.findall(r'"#/components/(\w+)/(\w+)"', json.dumps(document)))
    assert len(references) > 20
    assert {pair for pair in references if pair[1] not in components[pair[0]]} == set()


@pytest.mark.parametrize("stream", [False, True])
def test_calls_fit_their_schemas(document: dict[str, Any], stream: bool) -> None:
    tools = [TOOL, {"type": "function", "function": {"name": "now", "strict": False}}]
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    result = {"role": "tool", "tool_call_id": CALL["id"], "content": "fine"}
    asked: dict[str, Any] = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result],
        "tools": tools,
        "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed},
        "chat_template_kwargs": {"enable_thinking": False},
        "stream": stream,
    }
    check = validator(document, "ChatRequest")
    told = [e.json_path for e in check.iter_errors({"model": "tiny", **asked})]
    assert told == []
    text = f"<think>a</think>b{QWEN_CALL.replace('get_weather', 'now')}"
    response = post("qwen", FakeUpstream(says_of("qwen", text)), **asked)
    assert response.status_code == 200
    answers = events(response)[:-1] if stream else [response.json()]
    for each in answers:
        validator(document, "ChatChunk" if stream else "Chat").validate(each)
    assert any("tool_calls" in json.dumps(each) for each in answers)
