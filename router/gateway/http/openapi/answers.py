"""The answers of all routes, and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router.gateway.predict.body import MAX_AXIS
from router.messages.tensor_bytes import NUMPY_DTYPES, TEXT

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
BOOLEAN: Schema = {"type": "boolean"}


def text(least: int = 0, **more: object) -> Schema:
    """Return the schema of a text of ``least`` characters or more."""
    return {"type": "string", **({"minLength": least} if least else {}), **more}


def integer(low: int, high: int | None = None) -> Schema:
    """Return the schema of an integer from ``low`` to ``high``."""
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def items(of: Schema, least: int = 0) -> Schema:
    """Return the schema of a list of ``least`` entries or more."""
    return {"type": "array", "items": of, **({"minItems": least} if least else {})}


def one_of(*values: object) -> Schema:
    """Return the schema of some values."""
    return {"enum": list(values)}


def either(*schemas: Schema) -> Schema:
    """Return the schema of what fits one of several."""
    return {"anyOf": list(schemas)}


def record(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    """Return the schema of an object with no fields beside ``properties``."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def answer(**properties: Schema) -> Schema:
    """Return the schema of an object that has all of these fields, and no other."""
    return record(properties, list(properties))


def ref(name: str) -> Schema:
    """Return the reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


_COUNT = integer(0)
_IDS = items(_COUNT)
_NUMBER: Schema = {"type": "number"}
_FINISHED = one_of("stop", "length", "tool_calls", None)
_EXTRAS: Mapping[str, Schema] = {
    "exact": BOOLEAN,
    "token_ids": _IDS,
    "routed_experts": ref("ExpertRows"),
}
"""What choices have beside OpenAI's fields: in a stream where it is known, and where it is asked
for."""
_PROMPT_LOGPROB = answer(logprob=_NUMBER, rank=integer(1), decoded_token=text())
_TOKEN = {"token": text(), "logprob": _NUMBER, "bytes": items(integer(0, 255))}
_COMPLETION_LOGPROBS = answer(
    tokens=items(text()),
    token_logprobs=items(either(_NUMBER, NULL)),
    top_logprobs=items(either({"type": "object", "additionalProperties": _NUMBER}, NULL)),
    text_offset=_IDS,
)
_CHAT_LOGPROBS = answer(
    content=items(answer(**_TOKEN, top_logprobs=items(answer(**_TOKEN)))), refusal=NULL
)


def _choice(logprobs: Schema, more: Mapping[str, Schema], **own: Schema) -> Schema:
    """Return the schema of a choice: its ``own`` fields, and ``more`` that it may have."""
    fixed = {
        "index": _COUNT,
        "logprobs": either(logprobs, NULL),
        "finish_reason": _FINISHED,
        **own,
    }
    return record({**fixed, **_EXTRAS, **more}, list(fixed))


def _envelope(kind: str, choice: Schema, usage: Schema, is_whole: bool) -> Schema:
    fixed = {
        "id": text(1),
        "object": one_of(kind),
        "created": _COUNT,
        "model": text(1),
        "choices": items(choice),
    }
    needed = [*fixed, "usage"] if is_whole else list(fixed)
    return record({**fixed, "usage": usage, "prompt_token_ids": _IDS}, needed)


_PROMPT: Mapping[str, Schema] = {
    "prompt_token_ids": _IDS,
    "prompt_logprobs": items(
        either({"type": "object", "additionalProperties": _PROMPT_LOGPROB}, NULL)
    ),
}
_CALLED = {"id": text(1), "type": one_of("function")}
_CALL = answer(**_CALLED, function=answer(name=text(1), arguments=text()))
_CALL_PART = record(
    {
        **_CALLED,
        "index": integer(0),
        "function": record({"name": text(1), "arguments": text()}, ["arguments"]),
    },
    ["index", "function"],
)
_ROLE, _REASONING = {"role": one_of("assistant")}, {"reasoning_content": text()}
_MESSAGE = record(
    {**_ROLE, "content": either(text(), NULL), **_REASONING, "tool_calls": items(_CALL, 1)},
    ["role", "content"],
)
_DELTA = record({**_ROLE, "content": text(), **_REASONING, "tool_calls": items(_CALL_PART, 1)})
_COMPLETION_CHOICE = _choice(_COMPLETION_LOGPROBS, _PROMPT, text=text())
_MODEL = answer(
    id=text(1),
    object=one_of("model"),
    created=_COUNT,
    owned_by=text(),
    max_model_len=integer(1),
)
_ERROR = answer(
    message=text(1),
    type=text(1),
    param=either(text(1), NULL),
    code=either(text(1), NULL),
)
_SIZE = integer(0, 2**63 - 1)
_AXIS = integer(1, MAX_AXIS)
_DESCRIBED = items(
    answer(name=text(1), datatype=one_of(*NUMPY_DTYPES, TEXT), shape=items(integer(-1)))
)


def _output() -> Schema:
    shared = {
        "name": text(1),
        "datatype": one_of(*NUMPY_DTYPES, TEXT),
        "shape": items(_AXIS),
    }
    return either(
        answer(**shared, data=items({"type": ["number", "boolean", "string"]})),
        answer(**shared, parameters=answer(binary_data_size=_SIZE)),
    )


ANSWERS: Mapping[str, Schema] = {
    "Usage": record(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": answer(cached_tokens=_COUNT),
        },
        ["prompt_tokens", "completion_tokens", "total_tokens"],
    ),
    "Completion": _envelope("text_completion", _COMPLETION_CHOICE, ref("Usage"), True),
    "CompletionChunk": _envelope(
        "text_completion", _COMPLETION_CHOICE, either(ref("Usage"), NULL), False
    ),
    "Chat": _envelope(
        "chat.completion", _choice(_CHAT_LOGPROBS, {}, message=_MESSAGE), ref("Usage"), True
    ),
    "ChatChunk": _envelope(
        "chat.completion.chunk",
        _choice(_CHAT_LOGPROBS, {}, delta=_DELTA),
        either(ref("Usage"), NULL),
        False,
    ),
    "Tokenized": answer(
        count=_COUNT,
        max_model_len=integer(1),
        tokens=_IDS,
        token_strs=either(items(text()), NULL),
    ),
    "Detokenized": answer(prompt=text()),
    "Model": _MODEL,
    "Models": answer(object=one_of("list"), data=items(ref("Model"))),
    "Front": record(
        dict.fromkeys(("name", "version", "documentation", "openapi", "models"), text(1)),
        ["name", "documentation", "openapi", "models"],
    ),
    "ModelNames": answer(models=items(text(1))),
    "Alive": answer(status=one_of("alive")),
    "Ready": record(
        {
            "ready": BOOLEAN,
            "reason": either(text(1), NULL),
            "epoch": either({"type": "integer"}, NULL),
            "placement_version": either({"type": "integer"}, NULL),
            "controller_loop_age_s": either(_NUMBER, NULL),
            "failed_deploy": either(text(1), NULL),
        },
        ["ready"],
    ),
    "Error": answer(error=_ERROR),
    "Server": answer(name=text(1), version=text(1), extensions=items(text(1))),
    "Live": answer(live=one_of(True)),
    "AllReady": answer(ready=BOOLEAN),
    "ModelReady": answer(name=text(1), ready=BOOLEAN),
    "ModelMetadata": answer(
        name=text(1),
        versions=items(text(1)),
        platform=text(1),
        inputs=_DESCRIBED,
        outputs=_DESCRIBED,
    ),
    "InferResponse": record(
        {
            "id": text(),
            "model_name": text(1),
            "model_version": text(1),
            "parameters": answer(exact=BOOLEAN, identity=text()),
            "outputs": items(_output()),
        },
        ["model_name", "model_version", "parameters", "outputs"],
    ),
    "PredictionError": answer(error=text(1)),
}
"""The schemas of answers by their name in the document. Chunks are the events of a stream, which
ends with ``[DONE]``."""
