"""The objects within a request: messages, tools, the form of an answer, and experts of tokens."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SkipValidation, Tag, WithJsonSchema

from cluster.errors import shown
from router.gateway.input.request import base
from router.gateway.input.request.base import Filled, Nullable, Part, Text, either, refused

MAX_TOOLS_BYTES = 256 << 10
"""Of all tools together, as JSON."""
KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""The forms of ``structured_outputs``, of which one is given."""

Name = Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Part):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(Part):
    """A function that was called; OpenAI's client sends back what it has made of the arguments."""

    name: Name
    arguments: Text = ""
    parsed_arguments: Any = None


class Call(Nullable):
    """A call in an assistant's message; clients send the index of a streamed call back with it."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Any = None


Content = Annotated[
    Annotated[Text, Tag("a string")]
    | Annotated[list[TextPart], Field(fail_fast=True), Tag("a list")],
    either("a string", "a list"),
]
Calls = Annotated[list[Call], Field(min_length=1, max_length=128, fail_fast=True)]


class GivenMessage(Nullable):
    """A message of a system, a developer or a user."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: Text | None = None


class AssistantMessage(Nullable):
    """A message of the assistant; beside calls it needs no content."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: Calls | None = None
    reasoning_content: Text | None = None
    parsed: Any = None


class ToolMessage(Nullable):
    """What a call has returned."""

    role: Literal["tool"]
    content: Content
    name: Text | None = None
    tool_call_id: CallId


Message = GivenMessage | AssistantMessage | ToolMessage
Messages = Annotated[
    list[Annotated[Message, Field(discriminator="role")]],
    Field(min_length=1, max_length=4096, fail_fast=True),
]


class Function(Nullable):
    """What a tool does, and a JSON schema of its parameters."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}})
    strict: bool = False


class Tool(Part):
    """A function that the answer may call."""

    type: Literal["function"]
    function: Function


def _small(given: object) -> object:
    try:
        size = len(json.dumps(given))
    except RecursionError:
        raise refused("is nested too deep") from None
    if size > MAX_TOOLS_BYTES:
        raise refused(f"is larger than {MAX_TOOLS_BYTES} bytes")
    return given


Tools = Annotated[list[Tool], Field(max_length=128, fail_fast=True), BeforeValidator(_small)]


class FunctionName(Part):
    """The name of a tool's function."""

    name: Name


class NamedTool(Part):
    """A choice of one of the tools."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Part):
    """The tools that may be called, and whether one of them must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128, fail_fast=True)]


class SomeTools(Part):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a string")]
    | Annotated[NamedTool | SomeTools, Field(discriminator="type"), Tag("a mapping")],
    either("none, auto, required", "a mapping"),
]


def _option(given: object) -> object:
    is_number = isinstance(given, int | float) and abs(given) < 2**31
    if given is None or isinstance(given, str) or is_number:
        return given
    raise refused(
        f"must be a string, a number below 2**31, true, false or null; got {shown(given)}"
    )


Option = Annotated[
    Annotated[str, Field(max_length=256)] | bool | int | float | None, BeforeValidator(_option)
]
TemplateOptions = Annotated[dict[str, Option], Field(max_length=16)]


class JsonSchema(Part):
    """A schema, and what changes no answer: every answer has the schema's form."""

    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class PlainFormat(Part):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Part):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


def _of_one_kind(schema: base.Schema, cls: type[Part]) -> None:
    base.described(schema, cls)
    given = {kind: {"not": base.NULL} for kind in KINDS}
    schema["oneOf"] = [{"required": [kind], "properties": {kind: given[kind]}} for kind in KINDS]


class StructuredOutputs(Nullable):
    """The form of an answer, of one kind."""

    model_config = ConfigDict(json_schema_extra=_of_one_kind)

    json_: SkipValidation[dict[str, Any] | str | None] = Field(None, alias="json")
    regex: Filled | None = None
    choice: Annotated[list[Filled], Field(min_length=1, max_length=1024, fail_fast=True)] | None = (
        None
    )
    grammar: Filled | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: Text | None = None


def _decoded(given: object) -> object:
    """Return JSON's base64 as bytes, which gRPC has."""
    try:
        return base64.b64decode(given, validate=True) if isinstance(given, str) else given
    except (binascii.Error, ValueError):
        raise refused("is not base64") from None


Base64 = Annotated[
    bytes,
    BeforeValidator(_decoded),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]
Shape = Annotated[
    list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3, fail_fast=True)
]


class ExpertRows(Part):
    """The experts of tokens: their ids [tokens, MoE layers, experts per token], row-major."""

    data: Base64
    dtype: Literal["uint8", "uint16"]
    shape: Shape


class StreamOptions(Part):
    """What comes in a stream; it is not padded, so the last of them changes nothing."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
