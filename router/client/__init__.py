"""The Python client: generate, stream, status and model info over gRPC, each with a deadline.

Needs neither torch nor ray nor transformers. Raises the errors of :mod:`cluster.errors`, as the
gateway raised them.
"""

from router.client.aio import AsyncClient
from router.client.session import DEFAULT_ADDRESS, DEFAULT_RETRY, DEFAULT_TIMEOUT_S
from router.client.sync import Client
from router.client.types import Message, ModelInfo, Reply, Sampling, UnreachableError
from router.messages.request import Usage

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_RETRY",
    "DEFAULT_TIMEOUT_S",
    "AsyncClient",
    "Client",
    "Message",
    "ModelInfo",
    "Reply",
    "Sampling",
    "UnreachableError",
    "Usage",
]
