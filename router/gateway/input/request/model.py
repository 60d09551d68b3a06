"""The requests of clients: the name, type, bounds and default of every field.

HTTP's bodies and gRPC's messages are read by these models, and the OpenAPI document is made of
them. What no schema can say is checked later: fields that exclude each other, and what a model
allows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SkipValidation, Tag, create_model

from cluster.errors import shown
from cluster.spec import OnExpertLoss
from router.config.deployment import GatewayConfig
from router.gateway.input.request import base, harmless, parts
from router.gateway.input.request.base import Filled, Kind, either, refused

MAX_BIASES = 1024
MAX_PROMPTS = 128
_ID = "^(0|[1-9][0-9]{0,9})$"


@dataclass(frozen=True)
class Key:
    """The key of the gateway's configuration that has the upper bound of a field.

    The field counts in parts of the key's unit: ``parts`` are one.
    """

    name: str
    parts: int = 1


def _token_id(key: object) -> int:
    """Return the number of a JSON key, which is a text; gRPC's is a number."""
    number = int(key) if isinstance(key, str) and re.fullmatch(_ID, key) else key
    if not isinstance(number, int) or number < 0:
        raise refused(f"must be a token id; got {shown(key)}")
    return number


def _few(biases: object) -> object:
    """Refuse very many at once: pydantic looks at each, and tells of each that is wrong."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise refused(f"has {len(biases)} entries; at most {MAX_BIASES}")
    return biases


TokenId = Annotated[int, Field(ge=0)]
"""A number below the vocabulary, which is another for each model."""
_Key = Annotated[str, Field(pattern=_ID)]
TokenKey = Annotated[int, BeforeValidator(_token_id, json_schema_input_type=_Key)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[TokenKey, Bias],
    Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
    BeforeValidator(_few),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Long = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Short = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[
    Annotated[Short, Tag("a string")]
    | Annotated[list[Short], Field(max_length=16, fail_fast=True), Tag("a list")],
    either("a string", "a list"),
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Prompt = Filled | Annotated[list[TokenId], Field(min_length=1)]
NumLogprobs = Annotated[int | None, Field(ge=0), Key("max_logprobs")]


def _with_others(schema: base.Schema, cls: type[Request]) -> None:
    base.described(schema, cls)
    for name, values in cls.others.items():
        schema["properties"][name] = {} if values is None else {"enum": [*values, None]}


class Request(base.Nullable):
    """What every request has."""

    model_config = ConfigDict(json_schema_extra=_with_others)
    others: ClassVar[harmless.Values] = {}

    model: Any = ""

    def shared(self, record: type) -> dict[str, Any]:
        """Return the fields, where they are set, that a record of the router's has too."""
        names = _common(record, type(self))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def _refuse(cls, name: str, value: Any) -> None:
        harmless.check_harmless(name, value, cls.others, cls.names)


@cache
def _common(record: type, kind: type[Request]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record) if field.name in kind.model_fields)


class Generation(Request):
    """What every request to generate has; a lower ``priority`` is handled earlier."""

    max_tokens: Annotated[int | None, Field(ge=0)] = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1), Key("max_choices")] = 1
    stop: Stops | None = None
    seed: Long | None = None
    ignore_eos: bool = False
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    # With one near 0, products of logits are infinite.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] = 1.0
    logit_bias: Biases | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    bad_words: Annotated[list[Short], Field(max_length=128, fail_fast=True)] | None = None
    structured_outputs: parts.StructuredOutputs | None = None
    return_routed_experts: bool = False
    routed_experts: parts.ExpertRows | None = None
    timeout_s: Annotated[float | None, Field(gt=0), Key("max_timeout_s")] = None
    on_expert_loss: OnExpertLoss | None = None
    priority: Long = 0
    cache_salt: Short | None = None


class OfPrompt(Generation):
    """A request that may also ask about its prompt."""

    logprobs: NumLogprobs = None
    echo: bool = False
    prompt_logprobs: NumLogprobs = None


class GrpcRequest(OfPrompt):
    """gRPC's ``GenerateRequest``, with the fields of its ``sampling``."""

    prompt: str | None = None
    prompt_token_ids: SkipValidation[list[TokenId] | None] = None
    messages: parts.Messages | None = None


class OpenAiRequest(Generation):
    """What completions and chats have."""

    stream: bool = False
    stream_options: parts.StreamOptions | None = None
    return_token_ids: bool = False
    response_format: parts.ResponseFormat | None = None


class CompletionRequest(OpenAiRequest, OfPrompt):
    """A body of ``/v1/completions``."""

    others: ClassVar[harmless.Values] = harmless.OF_COMPLETIONS

    prompt: SkipValidation[
        Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    ]


class ChatRequest(OpenAiRequest):
    """A body of ``/v1/chat/completions``."""

    others: ClassVar[harmless.Values] = harmless.OF_CHATS

    messages: parts.Messages
    logprobs: bool = False
    top_logprobs: NumLogprobs = None
    max_completion_tokens: Annotated[int | None, Field(ge=0)] = None
    tools: parts.Tools | None = None
    tool_choice: parts.ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: parts.TemplateOptions | None = None
    reasoning_effort: Effort | None = None


class TokenizeRequest(Request):
    """A body of ``/tokenize``, and gRPC's ``TokenizeRequest``."""

    others: ClassVar[harmless.Values] = harmless.OF_TOKENIZE

    prompt: str | None = None
    messages: parts.Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool = False
    tools: parts.Tools | None = None
    chat_template_kwargs: parts.TemplateOptions | None = None


class DetokenizeRequest(Request):
    """A body of ``/detokenize``."""

    tokens: SkipValidation[list[TokenId]]


@lru_cache(maxsize=64)
def within(kind: type[Kind], limits: GatewayConfig) -> type[Kind]:
    """Return a model whose fields have the upper bounds of a configuration."""
    bounded: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        for key in field.metadata:
            if isinstance(key, Key):
                most = Field(le=getattr(limits, key.name) * key.parts)
                bounded[name] = (Annotated[field.annotation, *field.metadata, most], field.default)
    return create_model(kind.__name__, __base__=kind, __module__=__name__, **bounded)
