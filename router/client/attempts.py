"""The attempts of one request of a client, with its deadline, its tokens so far and its retries."""

from __future__ import annotations

import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from cluster.errors import (
    ExpertMeshError,
    InvalidRequestError,
    ModelReplacedError,
    OverloadedError,
    UnavailableError,
)
from router.client.types import Reply
from router.client.wire import choices_of, reply_of
from router.protos import inference_pb2
from router.retry import Retries

_IDENTITY = re.compile(r"resume\[\d+\]\.identity")
GRACE_S = 5.0
"""Added to a call's timeout, so that the server's own DEADLINE_EXCEEDED arrives first."""


class RequestAttempts(ABC):
    """The attempts of one request within its deadline; nothing here waits."""

    def __init__(self, timeout_s: float, retries: Retries | None) -> None:
        """``retries`` is ``None`` for a request with a single attempt."""
        self._retries = retries
        self._is_first = True
        self._deadline_s = time.monotonic() + timeout_s

    @abstractmethod
    def request(self) -> Any:
        """Return the message of the next attempt, with the time that is left."""

    def start(self, method: Callable[..., Any]) -> Any:
        """Start the next attempt by a stub's method; returns what the method returns.

        An attempt after the first waits for a server that is away.
        """
        if self._is_first:
            return method(self.request(), timeout=self._remaining_s + GRACE_S)
        return method(self.request(), timeout=max(self._remaining_s, 0.0), wait_for_ready=True)

    def failed(self, error: ExpertMeshError) -> float:
        """Return the seconds until the next attempt; raises ``error`` if there is none."""
        if self._retries is None or not self._is_temporary(error):
            raise error
        delay_s = self._retries.next_delay_s(self._remaining_s, error.retry_after_s)
        if delay_s is None:
            raise error
        self._is_first = False
        return delay_s

    def succeeded(self) -> None:
        """Record the success of the request."""
        if self._retries is not None:
            self._retries.succeeded()

    @property
    def _remaining_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _is_temporary(self, error: ExpertMeshError) -> bool:
        return isinstance(error, UnavailableError)


class Attempts(RequestAttempts):
    """The attempts of one request for text, with its tokens so far."""

    def __init__(self, request: Any, timeout_s: float, retries: Retries | None) -> None:
        """``request`` is a ``GenerateRequest``; it gets a seed if it is to be retried."""
        super().__init__(timeout_s, retries)
        if retries is not None and not request.sampling.HasField("seed"):
            request.sampling.seed = secrets.randbits(63)
        self._request = request
        # Filled as choices begin, since the client may ask for a number that is not allowed.
        self._choices: dict[int, Any] = {}
        self._num_choices = request.sampling.n or 1

    def request(self) -> Any:
        """Return the ``GenerateRequest`` of the next attempt, with the tokens so far."""
        if self._is_first:
            return self._request
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.timeout_s = max(self._remaining_s, 1e-3)
        if self._choices:
            request.resume.extend(
                self._choices.get(index, inference_pb2.ResumedChoice())
                for index in range(self._num_choices)
            )
        return request

    def piece(self, message: Any) -> Reply:
        """Record a message of a stream; returns it as a :class:`Reply`."""
        choice = self._choices.setdefault(message.index, inference_pb2.ResumedChoice())
        choice.token_ids.extend(message.token_ids)
        choice.finished = bool(message.finish_reason)
        choice.inexact |= not message.exact
        choice.identity = message.identity or choice.identity
        choice.prompt_logprobs += sum(row.HasField("logprob") for row in message.prompt_logprobs)
        # With tokens the number of rows follows from theirs.
        rows = [] if message.token_ids else list(message.routed_experts.shape[:1])
        choice.routed_experts += sum(rows)
        if self._retries is not None:
            self._retries.progressed()
        return reply_of(message)

    def whole(self, message: Any) -> list[Reply]:
        """Record a whole answer; returns its choices by index."""
        self.succeeded()
        return choices_of(message)

    def all_finished(self) -> bool:
        """Return whether every choice has ended."""
        return sum(choice.finished for choice in self._choices.values()) == self._num_choices

    def check_finished(self) -> None:
        """Raise :class:`UnavailableError` for a stream that ends before its last token."""
        if not self.all_finished():
            raise UnavailableError("the stream ended before its last token")

    def failed(self, error: ExpertMeshError) -> float:
        """Return the seconds until the next attempt; raises ``error`` if there is none.

        Where the model of the tokens so far is served no longer, :class:`ModelReplacedError` is
        raised: a new request gets the new model's whole answer.
        """
        if isinstance(error, InvalidRequestError) and _IDENTITY.fullmatch(error.field):
            raise ModelReplacedError from error
        return super().failed(error)

    def _is_temporary(self, error: ExpertMeshError) -> bool:
        # A full queue may refuse a new request; a request that it has accepted waits for room.
        is_full = isinstance(error, OverloadedError) and error.retry_after_s is not None
        return super()._is_temporary(error) or (is_full and bool(self._choices))
