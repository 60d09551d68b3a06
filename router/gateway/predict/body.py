"""The fields of a prediction: parameters as both surfaces have them, and HTTP's body."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema, create_model

from cluster.spec import OnExpertLoss
from router.config.deployment import GatewayConfig
from router.gateway.input.request import base
from router.gateway.input.request.base import Nullable, Text
from router.gateway.input.request.model import Key, within
from router.messages.tensor_bytes import NUMPY_DTYPES

MAX_AXIS = 2**31 - 1
_AXIS = {"type": "integer", "minimum": 1, "maximum": MAX_AXIS}


class Parameters(Nullable):
    """What every object may have: it changes nothing, but MLServer's clients send it."""

    content_type: Literal["np"] | None = None


class InferParameters(Parameters):
    """The parameters of a request; ``timeout`` is Triton's, in microseconds."""

    timeout_s: Annotated[float | None, Field(gt=0), Key("max_timeout_s")] = None
    timeout: Annotated[int | None, Field(ge=1), Key("max_timeout_s", 1_000_000)] = None
    on_expert_loss: OnExpertLoss | None = None


class HttpParameters(InferParameters):
    """HTTP's, which choose the form of outputs too."""

    binary_data_output: bool = False


class InputParameters(Parameters):
    """An input's: how many of the bytes after the JSON are its values."""

    binary_data_size: Annotated[int | None, Field(ge=0, le=2**63 - 1)] = None


class OutputParameters(Parameters):
    """An output's: whether its values are bytes after the JSON."""

    binary_data: bool | None = None


def _with_values(schema: base.Schema, cls: type[Nullable]) -> None:
    base.described(schema, cls)
    size = {"properties": {"binary_data_size": {"type": "integer"}}}
    schema["oneOf"] = [
        {"required": [name], "properties": {name: values}}
        for name, values in (
            ("data", {"type": "array"}),
            ("parameters", {"type": "object", "required": ["binary_data_size"], **size}),
        )
    ]


class InferInput(Nullable):
    """An input; its shape and values are compared with the mixture's later."""

    model_config = ConfigDict(json_schema_extra=_with_values)

    name: Text
    shape: Annotated[list[Any], WithJsonSchema({"type": "array", "items": _AXIS})]
    datatype: Annotated[Any, WithJsonSchema({"enum": list(NUMPY_DTYPES)})]
    data: list[Any] | None = None
    parameters: InputParameters = Field(default_factory=InputParameters)


class InferOutput(Nullable):
    """A requested output."""

    name: Text
    parameters: OutputParameters = Field(default_factory=OutputParameters)


class InferRequest(Nullable):
    """A body of ``/v2/models/ID/infer``; without ``outputs`` all are requested."""

    id: Text | None = None
    parameters: HttpParameters = Field(default_factory=HttpParameters)
    inputs: Annotated[list[InferInput], Field(fail_fast=True)]
    outputs: Annotated[list[InferOutput], Field(fail_fast=True)] = Field([])


@lru_cache(maxsize=64)
def body_within(limits: GatewayConfig) -> type[InferRequest]:
    """Return the model of a body, whose parameters have the bounds of a configuration."""
    parameters = within(HttpParameters, limits)
    field = Field(default_factory=parameters)
    return create_model("InferRequest", __base__=InferRequest, parameters=(parameters, field))
