"""Requests made from the gateway's OpenAPI document, by schemathesis, and a check of each answer.

The gateway runs in this process, over an engine with a tiny random model and the mixtures of the
tests. An answer must be one that the document has for its route; what the document refuses must be
refused, by an error that names a field of the request.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import schemathesis
from fastapi import FastAPI
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

from router.config.deployment import GatewayConfig
from router.gateway.http.openapi.document import OPENAPI_PATH
from router.protos.errors import MAX_FIELD_BYTES, clean
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway, grammars_of
from tests.unit.prediction_fakes import MIXTURES

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}
"""Of a model whose longest answer comes in an instant."""
EOS = 0
TIMEOUT_S = 20.0
SHORT_S = 5.0
"""A request that gives itself no longer may fail for want of time."""
MAX_KEPT = 4
"""A good body keeps at most so many of its fields beside the required ones: with all of them, some
exclude each other nearly always."""
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance", "response_headers_conformance", "negative_data_rejection",
    "refusals_name_a_field", "streams_conform", "other_methods_are_refused", "ends_in_time",
)  # fmt: skip
MAX_TOKENS = 8
_INFER = "/infer"
_BODIES = {
    "/v1/completions": "CompletionRequest",
    "/v1/chat/completions": "ChatRequest",
    "/tokenize": "TokenizeRequest",
    "/detokenize": "DetokenizeRequest",
}
_REQUIRED: Mapping[str, Sequence[str]] = {
    "/v1/completions": ("model", "prompt"),
    "/v1/chat/completions": ("model", "messages"),
    "/tokenize": ("model", "prompt"),
    "/detokenize": ("model", "tokens"),
}
_STREAM = "text/event-stream"


@dataclass
class Found:
    """What came of the requests: answers by route and status, and the failures by their text."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    """A request, as a command of curl, by what is wrong with its answer."""

    def add(self, other: Found) -> None:
        """Add those of another run; of equal failures the first stands."""
        self.answers += other.answers
        self.failures = other.failures | self.failures

    @property
    def total(self) -> int:
        """The number of requests."""
        return self.answers.total()

    @property
    def routes(self) -> list[str]:
        """The routes that were asked."""
        return sorted({route for route, _ in self.answers})

    def count(self, route: str, least: int, most: int) -> int:
        """Return how many answers of a route had a status from ``least`` to ``most``."""
        return sum(
            number
            for (asked, status), number in self.answers.items()
            if asked == route and least <= status <= most
        )


@contextmanager
def gateway() -> Iterator[FastAPI]:
    """Give the app of a gateway whose engine runs in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_mixtral(folder, **SIZES)
        grammars = grammars_of(folder, VOCAB_SIZE, EOS)
        cluster = LocalCluster(folder, grammars=grammars)
        try:
            limits = GatewayConfig(default_timeout_s=TIMEOUT_S, max_timeout_s=TIMEOUT_S)
            yield LocalGateway(folder, cluster, limits).app
        finally:
            cluster.close()
            grammars.close()


def fuzz(
    app: FastAPI, seed: int, examples: int, has_bounds: bool = False, path: str | None = None
) -> Found:
    """Send ``examples`` requests to each route, or one ``path``; returns what came.

    The seed chooses them. With ``has_bounds`` also those with each bound of each field, which are
    always the same.
    """
    config = schemathesis.Config.from_dict(_config(seed, examples, has_bounds))
    whole = schemathesis.openapi.from_asgi(OPENAPI_PATH, app, config=config)
    schema = whole if path is None else whole.include(path=path)
    found = Found()
    for event in from_schema(schema).execute():
        if isinstance(event, ScenarioFinished):
            found.add(_of_scenario(event))
        elif isinstance(event, NonFatalError):
            found.failures[f"{event.label}: {event.value!r}"] = ""
        elif isinstance(event, FatalError):
            raise event.exception
    return found


def _config(seed: int, examples: int, has_bounds: bool) -> dict[str, Any]:
    return {
        "seed": seed,
        "workers": 1,
        "suppress-health-check": ["all"],
        "continue-on-failure": True,
        "warnings": False,
        "max-stream-events": 10_000,
        "output": {"sanitization": {"enabled": False}},
        "generation": {"max-examples": examples, "no-shrink": True, "database": "none"},
        "phases": {
            "examples": {"enabled": False},
            "coverage": {"enabled": has_bounds},
            "fuzzing": {"enabled": True},
            "stateful": {"enabled": False},
        },
        "checks": {
            "enabled": False,
            **{name: {"enabled": True} for name in CHECKS},
            "not_a_server_error": {"enabled": True, "expected-statuses": ["2xx", "4xx", "504"]},
        },
    }


def _of_scenario(event: ScenarioFinished) -> Found:
    recorder, found = event.recorder, Found()
    for case_id, interaction in recorder.interactions.items():
        if interaction.response is not None:
            found.answers[recorder.label, interaction.response.status_code] += 1
        for check in recorder.checks.get(case_id, ()):
            if check.failure_info is not None:
                failure = check.failure_info.failure
                told = f"{recorder.label}: {check.name}: {failure.title}\n{failure.message}"
                found.failures.setdefault(told, check.failure_info.code_sample)
    return found


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case, kwargs: Mapping[str, Any]) -> None:
    """Make of a body that fits its schema one that the validation is likely to take."""
    is_good = case.meta is not None and case.meta.generation.mode.is_positive
    if not is_good or not isinstance(case.body, dict):
        return
    source = random.Random(json.dumps(case.body, sort_keys=True, default=str))
    path = case.operation.path
    if path.endswith(_INFER):
        name = {"id": case.body["id"]} if source.random() < 0.5 and "id" in case.body else {}
        case.body = prediction(source, unquote(case.path_parameters["model"])) | name
    elif path in _REQUIRED:
        case.body = bounded(source, case.body, _REQUIRED[path])
        if path == "/tokenize" and case.body.get("prompt") is None and source.random() < 0.5:
            case.body["prompt"] = "a prompt"  # no schema says that it or messages must be there
        if path.startswith("/v1/") and case.body.get("max_completion_tokens") is None:
            case.body["max_tokens"] = source.randint(1, MAX_TOKENS)


def prediction(source: random.Random, model: str) -> dict[str, Any]:
    """Return a request for a mixture, with values of the right types and numbers."""
    rows = source.randint(1, 3)
    inputs = []
    for given in MIXTURES[model].spec.inputs:
        shape = [rows, *(2 if axis == -1 else axis for axis in given.shape)]
        data = [_value(source, given.datatype) for _ in range(math.prod(shape))]
        inputs.append(
            {"name": given.name, "datatype": given.datatype, "shape": shape, "data": data}
        )
    return {"inputs": inputs}


def _value(source: random.Random, datatype: str) -> bool | int | float:
    if datatype == "BOOL":
        return source.random() < 0.5
    if datatype.startswith("FP"):
        return source.uniform(0.5, 100)
    return source.randint(0, 255)


def bounded(
    source: random.Random, body: Mapping[str, Any], required: Sequence[str]
) -> dict[str, Any]:
    """Return a body with some of its fields, tokens of the vocabulary and few of them."""
    optional = sorted(set(body) - {*required, "prompt", "messages", "tokens"})
    kept = source.sample(optional, min(len(optional), source.randint(0, MAX_KEPT)))
    found = {name: value for name, value in body.items() if name in {*required, *kept}}
    if "top_logprobs" in found:
        found["logprobs"] = True
    if found.get("stream_options") is not None:
        found["stream"] = True
    for name in ("prompt", "tokens", "stop_token_ids"):
        if name in found:
            found[name] = _tokens_of(found[name])
    if "messages" in found:
        found["messages"] = found["messages"][:2]
    return found


def _tokens_of(value: Any) -> Any:
    """Return a prompt with ids of the vocabulary, and no more than the context has."""
    if isinstance(value, list):
        return [_tokens_of(entry) for entry in value[:8]]
    if isinstance(value, str):
        return value[:40]
    return value % VOCAB_SIZE if type(value) is int else value


@schemathesis.check
def refusals_name_a_field(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Check that a body that is JSON but wrong is refused by the name of a field."""
    if response.status_code != 400 or not isinstance(case.body, dict):
        return
    path = case.operation.path
    if path not in _BODIES:
        return
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error", error
    schema = case.operation.schema.raw_schema["components"]["schemas"]
    described = schema[_BODIES[path]]["properties"]
    names = [clean(name, MAX_FIELD_BYTES) or "''" for name in (*case.body, *described)]
    param = error["param"] or ""
    assert any(param == name or param.startswith((f"{name}.", f"{name}[")) for name in names), (
        f"no field is named: {error}"
    )


@schemathesis.check
def streams_conform(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Check every event of a stream, and its end."""
    if not response.headers.get("content-type", [""])[0].startswith(_STREAM):
        return
    document = case.operation.schema.raw_schema
    content = document["paths"][case.operation.path]["post"]["responses"]["200"]["content"]
    name = content[_STREAM]["x-event-schema"]["$ref"].rpartition("/")[2]
    *events, done, rest = response.content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), "a stream without its end"
    schema = document["components"]["schemas"][name] | {"components": document["components"]}
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert "error" not in chunk, f"a stream with an error: {chunk}"
        jsonschema.validate(chunk, schema)


@schemathesis.check
def ends_in_time(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Check that only a request's own short deadline passes."""
    if response.status_code != 504:
        return
    body = case.body if isinstance(case.body, dict) else {}
    parameters: Any = body.get("parameters") or {}
    given = [body.get("timeout_s"), *parameters.values()]
    assert any(isinstance(value, int | float) and value < SHORT_S for value in given), "is late"


@schemathesis.check
def other_methods_are_refused(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Check that a route refuses methods that the document does not have.

    Before a route is looked for, 415 refuses what a page of another site could send.
    """
    declared = case.operation.schema.raw_schema["paths"][case.operation.path]
    if case.method.lower() not in declared:
        assert response.status_code in (405, 415), response.status_code
