"""What both clients share: what they remember between requests, and how they make them.

Nothing here waits, so that one client may wait with threads and the other with asyncio.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.errors import ExpertMeshError, InvalidRequestError, UnknownModelError
from router.client.attempts import Attempts
from router.client.types import Message, Sampling, UnreachableError
from router.client.wire import sampling_message, typed_error
from router.protos import inference_pb2
from router.retry import Retries, RetryBudget, RetryPolicy

DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_RETRY = RetryPolicy(first_delay_s=0.1, max_delay_s=2.0)
INFO_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 930.0
"""Longer than a gateway waits, whose word on it is better."""


class Session:
    """One client's retry budget, its server's first model, and whether a server was ever there."""

    def __init__(self, address: str, retry: RetryPolicy | None) -> None:
        self.address = address
        self.first_model = ""
        self.was_reached = False
        self._retry = retry
        self._budget = RetryBudget()

    def request(
        self,
        prompt: str | Sequence[int] | None,
        messages: Sequence[Message],
        sampling: Sampling | None,
        model: str,
        timeout_s: float,
        on_expert_loss: str | None,
    ) -> Any:
        """Return a ``GenerateRequest``; raises :class:`InvalidRequestError` for what has no form.

        Whether it makes sense is the server's to say.
        """
        request = inference_pb2.GenerateRequest(model=model, timeout_s=timeout_s)
        try:
            request.messages.extend(
                inference_pb2.Message(role=one.role, content=one.content) for one in messages
            )
            if isinstance(prompt, str):
                request.prompt = prompt
            elif prompt is not None:
                request.prompt_token_ids.SetInParent()
                request.prompt_token_ids.ids.extend(prompt)
            if on_expert_loss is not None:
                request.on_expert_loss = on_expert_loss
            request.sampling.CopyFrom(sampling_message(sampling or Sampling()))
            if self._retry is not None and not request.sampling.HasField("seed"):
                request.sampling.seed = secrets.randbits(63)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"cannot be sent: {error}") from None
        return request

    def attempts(self, request: Any, timeout_s: float) -> Attempts:
        """Return the attempts of a request, within the budget of all of them."""
        retries = None if self._retry is None else Retries(self._retry, self._budget)
        return Attempts(request, timeout_s, retries)

    def failed(self, error: Any) -> ExpertMeshError:
        """Return the typed error of an ``grpc.RpcError``; a server's own word says it is there."""
        typed = typed_error(error, self.address)
        self.was_reached |= not isinstance(typed, UnreachableError)
        return typed

    @contextmanager
    def unknown_model_forgotten(self) -> Iterator[None]:
        """Ask for the first model again after an answer that what was the first is not served."""
        try:
            yield
        except UnknownModelError:
            self.first_model = ""
            raise
