"""The Python client: generate, stream, status and model info over gRPC, each with a deadline.

Needs neither torch nor ray nor transformers. Errors are those of :mod:`cluster.errors`, rebuilt by
the table that the gateway writes them with.
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
