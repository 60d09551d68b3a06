"""Predictions over the Open Inference Protocol: requests from arrays, arrays from replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cluster.errors import InternalError, InvalidRequestError
from router.client.attempts import RequestAttempts
from router.client.types import MixtureInfo, Prediction, TensorInfo
from router.client.wire import sendable
from router.messages.tensor_bytes import TEXT, array_of, bytes_of, datatype_of
from router.protos import open_inference_pb2 as messages
from router.protos.open_inference_pb2_grpc import GRPCInferenceServiceStub
from router.retry import Retries


class PredictionAttempts(RequestAttempts):
    """The attempts of one prediction; a prediction has no side effects, so it may be repeated."""

    def __init__(self, request: Any, timeout_s: float, retries: Retries | None) -> None:
        """``request`` is a ``ModelInferRequest``, to which each attempt adds the time left."""
        super().__init__(timeout_s, retries)
        self._request = request

    def request(self) -> Any:
        """Return the ``ModelInferRequest`` of the next attempt."""
        self._request.parameters["timeout_s"].double_param = max(self._remaining_s, 1e-3)
        return self._request

    def whole(self, message: Any) -> Prediction:
        """Record a reply; returns its arrays."""
        self.succeeded()
        return prediction_of(message)


def stub_of(channel: Any) -> Any:
    """Return the stub of the Open Inference Protocol for a channel of grpc or of grpc.aio."""
    return GRPCInferenceServiceStub(channel)


def request_of(
    model: str,
    inputs: Mapping[str, ArrayLike],
    outputs: Sequence[str] | None,
    on_expert_loss: str | None,
) -> Any:
    """Return a ``ModelInferRequest``; raises :class:`InvalidRequestError` for an array that no
    mixture can take. The server checks all else."""
    with sendable():
        request = messages.ModelInferRequest(
            model_name=model, outputs=[{"name": name} for name in outputs or ()]
        )
        if on_expert_loss is not None:
            request.parameters["on_expert_loss"].string_param = on_expert_loss
    for name, values in inputs.items():
        try:
            array = np.asarray(values)
            datatype = datatype_of(array)
            if datatype == TEXT:
                raise ValueError("is an array of texts, which no input of a mixture is")
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(bytes_of(array))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(str(error), f"inputs.{name}") from None
    return request


def prediction_of(message: Any) -> Prediction:
    """Return the arrays of a ``ModelInferResponse``; raises :class:`InternalError` where its bytes
    are not those of its tensors."""
    try:
        outputs = {
            tensor.name: array_of(tensor.datatype, tuple(tensor.shape), data)
            for tensor, data in zip(message.outputs, message.raw_output_contents, strict=True)
        }
    except (KeyError, ValueError) as error:
        raise InternalError(f"the server's reply is malformed: {error}") from None
    return Prediction(
        outputs,
        message.parameters["exact"].bool_param,
        message.parameters["identity"].string_param,
    )


def metadata_request(model: str) -> Any:
    """Return a ``ModelMetadataRequest``."""
    return messages.ModelMetadataRequest(name=model)


def info_of(message: Any) -> MixtureInfo:
    """Return the description in a ``ModelMetadataResponse``."""
    return MixtureInfo(message.name, _tensors(message.inputs), _tensors(message.outputs))


def _tensors(tensors: Any) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in tensors
    )
