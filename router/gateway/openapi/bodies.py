"""The bodies of ``/v1``, ``/tokenize`` and ``/detokenize``, as the gateway's validation takes them.

A schema cannot say all that the validation checks: a prompt that fits the context, fields that
exclude each other. Whatever a schema refuses, the validation refuses too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cluster.spec import ON_EXPERT_LOSS
from router.config import GatewayConfig
from router.gateway import grammar, token_rules, validate
from router.gateway.openai.completions import MAX_PROMPTS
from router.gateway.openai.fields import CHAT, COMPLETION, STREAM_OPTIONS, Fields
from router.gateway.openai.tokens import DETOKENIZE, TOKENIZE
from router.gateway.openapi.schema import (
    ANYTHING,
    BOOLEAN,
    NULL,
    Schema,
    answer,
    body,
    either,
    integer,
    items,
    number,
    one_of,
    record,
    ref,
    text,
)
from router.gateway.prompts import MAX_MESSAGES, ROLES
from router.gateway.tools.definitions import MAX_TOOLS
from router.gateway.tools.messages import MAX_CALLS, MAX_ID_CHARS
from router.gateway.tools.template import EFFORTS, MAX_OPTION_CHARS, MAX_OPTIONS
from router.messages.routed import LITTLE_ENDIAN

_SEEDS = integer(-(2**63), 2**63 - 1)
_IDS = items(integer(0))
_PENALTY = number(-token_rules.MAX_PENALTY, token_rules.MAX_PENALTY)
_STOP = text(1, validate.MAX_STOP_CHARS)
_OPTIONS = record({name: either(BOOLEAN, NULL) for name in STREAM_OPTIONS})
_JSON_SCHEMA = record(
    {
        "name": either(text(), NULL),
        "description": either(text(), NULL),
        "schema": {"type": "object"},
        "strict": either(BOOLEAN, NULL),
    },
    ["schema"],
)
RESPONSE_FORMAT: Schema = either(
    record({"type": one_of("text", "json_object")}, ["type"]),
    record({"type": one_of("json_schema"), "json_schema": _JSON_SCHEMA}, ["type", "json_schema"]),
)
_FORMS: Mapping[str, Schema] = {
    "json": either({"type": "object"}, text()),
    "regex": text(1),
    "choice": items(text(1), 1, grammar.MAX_CHOICES),
    "grammar": text(1),
    "json_object": BOOLEAN,
}
ROUTED_EXPERTS = answer(
    data=text(0, contentEncoding="base64"),
    dtype=one_of(*LITTLE_ENDIAN),
    shape=items(integer(1), 3, 3),
)
_PART = record({"type": one_of("text"), "text": text()}, ["type", "text"])
_NAME = text(1, 64, pattern="^[a-zA-Z0-9_-]+$")
_CALL = body(
    {
        "id": text(1, MAX_ID_CHARS),
        "type": one_of("function"),
        "function": record(
            {"name": _NAME, "arguments": text(), "parsed_arguments": ANYTHING}, ["name"]
        ),
        "index": ANYTHING,
    },
    ["id", "function"],
)
_CONTENT = either(text(), items(_PART))
_WITHOUT_CALLS = [role for role in ROLES if role not in ("assistant", "tool")]
MESSAGE: Schema = either(
    body(
        {"role": one_of(*_WITHOUT_CALLS), "content": _CONTENT, "name": text()}, ["role", "content"]
    ),
    body(
        {
            "role": one_of("assistant"),
            "content": _CONTENT,
            "name": text(),
            "tool_calls": items(_CALL, 1, MAX_CALLS),
            "reasoning_content": text(),
            "parsed": ANYTHING,
        },
        ["role"],
    ),
    body(
        {
            "role": one_of("tool"),
            "content": _CONTENT,
            "name": text(),
            "tool_call_id": text(1, MAX_ID_CHARS),
        },
        ["role", "content", "tool_call_id"],
    ),
)
_FUNCTION = body(
    {"name": _NAME, "description": text(), "parameters": {"type": "object"}, "strict": BOOLEAN},
    ["name"],
)
_TOOL = record({"type": one_of("function"), "function": _FUNCTION}, ["type", "function"])
_TOOLS = items(_TOOL, 0, MAX_TOOLS)
_NAMED = record(
    {"type": one_of("function"), "function": record({"name": _NAME}, ["name"])},
    ["type", "function"],
)
_ALLOWED = record(
    {"mode": one_of("auto", "required"), "tools": items(_NAMED, 1, MAX_TOOLS)}, ["mode", "tools"]
)
_CHOICE = either(
    one_of("none", "auto", "required"),
    _NAMED,
    record({"type": one_of("allowed_tools"), "allowed_tools": _ALLOWED}, ["type", "allowed_tools"]),
)
_TEMPLATE_OPTIONS: Schema = {
    "type": "object",
    "additionalProperties": either(text(0, MAX_OPTION_CHARS), BOOLEAN, NULL, {"type": "number"}),
    "maxProperties": MAX_OPTIONS,
}


def completion(models: Sequence[str], limits: GatewayConfig) -> Schema:
    """Return the schema of a body of ``/v1/completions``."""
    prompts = either(text(1), items(integer(0), 1))
    own = {
        "prompt": either(prompts, items(prompts, 1, MAX_PROMPTS)),
        "logprobs": integer(0, limits.max_logprobs),
        "echo": BOOLEAN,
        "prompt_logprobs": integer(0, limits.max_logprobs),
    }
    return _body(COMPLETION, _common(models, limits) | own, ["model", "prompt"])


def chat(models: Sequence[str], limits: GatewayConfig) -> Schema:
    """Return the schema of a body of ``/v1/chat/completions``."""
    own = {
        "messages": items(ref("Message"), 1, MAX_MESSAGES),
        "logprobs": BOOLEAN,
        "top_logprobs": integer(0, limits.max_logprobs),
        "max_completion_tokens": integer(0),
        "tools": _TOOLS,
        "tool_choice": _CHOICE,
        "parallel_tool_calls": BOOLEAN,
        "chat_template_kwargs": _TEMPLATE_OPTIONS,
        "reasoning_effort": one_of(*EFFORTS),
    }
    return _body(CHAT, _common(models, limits) | own, ["model", "messages"])


def tokenize(models: Sequence[str], limits: GatewayConfig) -> Schema:
    """Return the schema of a body of ``/tokenize``."""
    properties = {
        "model": one_of(*models),
        "prompt": text(),
        "messages": items(ref("Message"), 1, MAX_MESSAGES),
        "add_special_tokens": BOOLEAN,
        "add_generation_prompt": BOOLEAN,
        "return_token_strs": BOOLEAN,
        "tools": _TOOLS,
        "chat_template_kwargs": _TEMPLATE_OPTIONS,
    }
    return _body(TOKENIZE, properties, ["model"])


def detokenize(models: Sequence[str], limits: GatewayConfig) -> Schema:
    """Return the schema of a body of ``/detokenize``."""
    return _body(DETOKENIZE, {"model": one_of(*models), "tokens": _IDS}, ["model", "tokens"])


BODIES: Mapping[str, Callable[[Sequence[str], GatewayConfig], Schema]] = {
    "CompletionRequest": completion,
    "ChatRequest": chat,
    "TokenizeRequest": tokenize,
    "DetokenizeRequest": detokenize,
}
"""The schemas of bodies by their name in the document; each is of the served language models."""


def _body(fields: Fields, properties: Mapping[str, Schema], required: Sequence[str]) -> Schema:
    """Return the schema of a body with the harmless values of fields that are not served."""
    harmless = {
        name: ANYTHING if values is None else one_of(*values) if values else NULL
        for name, values in fields.harmless.items()
    }
    return body({**properties, **harmless}, required)


def _common(models: Sequence[str], limits: GatewayConfig) -> dict[str, Schema]:
    """Return the fields that completions and chats have."""
    return {
        "model": one_of(*models),
        "stream": BOOLEAN,
        "stream_options": _OPTIONS,
        "return_token_ids": BOOLEAN,
        "return_routed_experts": BOOLEAN,
        "routed_experts": ROUTED_EXPERTS,
        "max_tokens": integer(0),
        "temperature": number(0, validate.MAX_TEMPERATURE),
        "top_p": number(0, 1, above=True),
        "top_k": integer(-1, 2**31 - 1),
        "min_p": number(0, 1),
        "n": integer(1, limits.max_choices),
        "stop": either(_STOP, items(_STOP, 0, validate.MAX_STOPS)),
        "seed": _SEEDS,
        "ignore_eos": BOOLEAN,
        **_rules(),
        "response_format": RESPONSE_FORMAT,
        "structured_outputs": _structured_outputs(),
        "timeout_s": number(0, limits.max_timeout_s, above=True),
        "on_expert_loss": one_of(*ON_EXPERT_LOSS),
        "priority": integer(*validate.PRIORITIES),
        "cache_salt": text(1, validate.MAX_SALT_CHARS),
    }


def _rules() -> dict[str, Schema]:
    bias = number(-token_rules.MAX_BIAS, token_rules.MAX_BIAS)
    biases = {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": bias,
        "maxProperties": token_rules.MAX_BIASES,
    }
    word = text(1, token_rules.MAX_BAD_WORD_CHARS)
    return {
        "frequency_penalty": _PENALTY,
        "presence_penalty": _PENALTY,
        "repetition_penalty": number(token_rules.LEAST_SCALE, token_rules.MAX_PENALTY),
        "logit_bias": biases,
        "min_tokens": integer(0),
        "stop_token_ids": items(integer(0), 0, token_rules.MAX_STOP_IDS),
        "bad_words": items(word, 0, token_rules.MAX_BAD_WORDS),
    }


def _structured_outputs() -> Schema:
    """Return one schema for each form, which alone is given."""
    return either(*(_form(kind) for kind in grammar.KINDS))


def _form(kind: str) -> Schema:
    whitespace: dict[str, Schema] = {"disable_any_whitespace": either(one_of(False), NULL)}
    if kind in ("json", "json_object"):
        whitespace = {
            "disable_any_whitespace": either(BOOLEAN, NULL),
            "whitespace_pattern": either(text(), NULL),
        }
    return record({kind: _FORMS[kind], **whitespace}, [kind], NULL)
