"""The Python client: generate, stream, predict, status and model info over gRPC, with deadlines.

It needs neither torch nor ray nor transformers. It raises the gateway's errors as the types of
:mod:`cluster.errors`.
"""

from router.client.aio import AsyncClient
from router.client.session import DEFAULT_ADDRESS, DEFAULT_RETRY, DEFAULT_TIMEOUT_S
from router.client.sync import Client
from router.client.tls import ClientTls
from router.client.types import (
    Message,
    MixtureInfo,
    ModelInfo,
    Prediction,
    Reply,
    RequestOptions,
    Sampling,
    TensorInfo,
    Token,
    UnreachableError,
)
from router.messages.request import PromptLogprobs, Usage

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_RETRY",
    "DEFAULT_TIMEOUT_S",
    "AsyncClient",
    "Client",
    "ClientTls",
    "Message",
    "MixtureInfo",
    "ModelInfo",
    "Prediction",
    "PromptLogprobs",
    "Reply",
    "RequestOptions",
    "Sampling",
    "TensorInfo",
    "Token",
    "UnreachableError",
    "Usage",
]
