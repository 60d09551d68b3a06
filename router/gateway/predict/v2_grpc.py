"""The Open Inference Protocol over gRPC: from request bytes to reply messages, without gRPC.

Each method raises :class:`cluster.errors.ExpertMeshError`; ``router/gateway/grpc/call.py`` turns
that into a status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from google.protobuf.message_factory import GetMessageClass

from cluster.errors import InvalidRequestError
from experts.mixture.parts import Output
from router.gateway.input.request.base import Kind, read, renamed
from router.gateway.input.request.model import within
from router.gateway.predict.body import InferParameters, Parameters
from router.gateway.predict.service import (
    EXTENSIONS,
    SERVER_NAME,
    SERVER_VERSION,
    PredictionService,
    metadata_of,
)
from router.gateway.predict.validate import (
    VERSION,
    CheckedPrediction,
    RawTensor,
)
from router.messages.prediction import PredictionReply
from router.messages.tensor_bytes import TEXT, bytes_of
from router.protos import open_inference_pb2 as messages
from router.protos.parse import parsed
from router.security.keys import Caller

PREDICTION_SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]
CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    TEXT: "bytes_contents",
}
"""The field of ``InferTensorContents`` that has the values of a datatype."""


class PredictionHandlers:
    """Answers requests through the :class:`PredictionService`."""

    def __init__(self, service: PredictionService) -> None:
        self._service = service

    async def answer(self, method: str, data: bytes, caller: Caller) -> Any:
        """Answer a method of the service by its name, from a caller's request to its reply."""
        rpc = PREDICTION_SERVICE.methods_by_name[method]
        is_infer = method == "ModelInfer"
        # The arrays of a request are views of its message, so the share lasts as long.
        with self._service.room.bodies.share_of(caller.name) as share:
            with self._service.metrics.refusals("grpc") if is_infer else nullcontext():
                share.take_message(data, self._service.limits.max_body_bytes)
                request = parsed(GetMessageClass(rpc.input_type), data)
            if is_infer:
                return await self._infer(request, caller)
            return _DESCRIPTIONS[method](self._service, request)

    async def _infer(self, request: Any, caller: Caller) -> Any:
        with self._service.metrics.refusals("grpc"):
            checked = _checked(request, self._service)
        is_raw = bool(request.raw_input_contents)

        def encode(reply: PredictionReply) -> Any:
            return _reply(request.id, checked, reply, is_raw)

        return await self._service.predict(checked, caller, "grpc", encode)


_DESCRIPTIONS: Mapping[str, Callable[[PredictionService, Any], Any]] = {
    "ServerLive": lambda service, request: messages.ServerLiveResponse(live=True),
    "ServerReady": lambda service, request: messages.ServerReadyResponse(
        ready=service.ready().is_ready
    ),
    "ModelReady": lambda service, request: messages.ModelReadyResponse(
        ready=service.model_ready(request.name, request.version)
    ),
    "ServerMetadata": lambda service, request: messages.ServerMetadataResponse(
        name=SERVER_NAME, version=SERVER_VERSION, extensions=EXTENSIONS
    ),
    "ModelMetadata": lambda service, request: messages.ModelMetadataResponse(
        **metadata_of(service.validator.mixture(request.name, request.version))
    ),
}
"""The methods beside ``ModelInfer``."""


def _checked(request: Any, service: PredictionService) -> CheckedPrediction:
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise InvalidRequestError(
            f"has {len(raws)} entries; must have one for each of the {len(request.inputs)} inputs",
            "raw_input_contents",
        )
    inputs = []
    for place, tensor in enumerate(request.inputs):
        where = f"inputs[{place}]"
        _parameters(Parameters, tensor, f"{where}.parameters")
        if raws and tensor.HasField("contents"):
            raise InvalidRequestError(
                "cannot be given together with raw_input_contents", f"{where}.contents"
            )
        data = raws[place] if raws else _contents(tensor, where)
        inputs.append(RawTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    for place, output in enumerate(request.outputs):
        _parameters(Parameters, output, f"outputs[{place}].parameters")
    return service.validator.check(
        request.model_name,
        request.model_version,
        inputs,
        [output.name for output in request.outputs],
        _parameters(within(InferParameters, service.limits), request, "parameters"),
    )


def _contents(tensor: Any, where: str) -> list[Any]:
    """Return the values of typed contents; those of another field than the datatype's are wrong."""
    values: list[Any] = []
    for field, given in tensor.contents.ListFields():
        if field.name != CONTENTS.get(tensor.datatype):
            raise InvalidRequestError(
                f"is not the field for {tensor.datatype!r:.20}, which is "
                f"{CONTENTS.get(tensor.datatype, 'none')}",
                f"{where}.contents.{field.name}",
            )
        values = list(given)
    return values


def _parameters(kind: type[Kind], message: Any, where: str) -> Kind:
    """Read a map of ``InferParameter``; one without a value is refused as a message."""
    values: dict[str, object] = {}
    for name, parameter in message.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = getattr(parameter, choice) if choice else parameter
    with renamed(lambda name: f"{where}.{name}"):
        return read(kind, values)


def _reply(
    request_id: str, checked: CheckedPrediction, reply: PredictionReply, is_raw: bool
) -> Any:
    """Return a reply whose tensors have the form of the request's: raw bytes, or typed contents."""
    message = messages.ModelInferResponse(
        model_name=checked.mixture.id, model_version=VERSION, id=request_id
    )
    message.parameters["exact"].bool_param = reply.exact
    message.parameters["identity"].string_param = reply.identity
    for output in checked.outputs():
        array = reply.outputs[output.name]
        tensor = message.outputs.add(name=output.name, datatype=output.datatype, shape=array.shape)
        if is_raw:
            message.raw_output_contents.append(bytes_of(array))
        else:
            _fill(tensor.contents, output, array)
    return message


def _fill(contents: Any, output: Output, array: np.ndarray) -> None:
    values = array.ravel().tolist()
    if output.datatype == TEXT:
        values = [text.encode() for text in values]
    getattr(contents, CONTENTS[output.datatype]).extend(values)
