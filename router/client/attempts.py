"""One request of the client over several attempts: its deadline, what came, whether to go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cluster.errors import ExpertMeshError, OverloadedError, UnavailableError
from router.protos import inference_pb2
from router.retry import Retries


class Attempts:
    """The attempts of one request within its time; nothing here waits."""

    def __init__(
        self,
        request: Any,
        timeout_s: float,
        retries: Retries | None,
    ) -> None:
        """``retries`` is ``None`` for a request that is tried once."""
        self.is_first = True
        self._request = request
        self._retries = retries
        self._deadline_s = time.monotonic() + timeout_s
        # Not made before they are there: nobody has checked yet how many were asked for.
        self._choices: dict[int, Any] = {}
        self._num_choices = request.sampling.n or 1

    @property
    def remaining_s(self) -> float:
        """The time until the request's deadline."""
        return self._deadline_s - time.monotonic()

    def request(self) -> Any:
        """Return the ``GenerateRequest`` of the next attempt: what has come, what time is left."""
        if self.is_first:
            return self._request
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.timeout_s = max(self.remaining_s, 1e-3)
        if self._choices:
            request.resume.extend(
                self._choices.get(index, inference_pb2.ResumedChoice())
                for index in range(self._num_choices)
            )
        return request

    def took(
        self, index: int, token_ids: Sequence[int], finish_reason: str | None, exact: bool
    ) -> None:
        """Note a piece of a stream that has come."""
        choice = self._choices.setdefault(index, inference_pb2.ResumedChoice())
        choice.token_ids.extend(token_ids)
        choice.finished = finish_reason is not None
        choice.inexact |= not exact
        if self._retries is not None:
            self._retries.progressed()

    def all_finished(self) -> bool:
        """Return whether every choice's end has come."""
        return sum(choice.finished for choice in self._choices.values()) == self._num_choices

    def failed(self, error: ExpertMeshError) -> float:
        """Return the seconds after which to try again; raises ``error`` where one must not."""
        if self._retries is None or not self._is_passing(error):
            raise error
        delay_s = self._retries.next_delay_s(self.remaining_s, error.retry_after_s)
        if delay_s is None:
            raise error
        self.is_first = False
        return delay_s

    def succeeded(self) -> None:
        """Note that the request is answered."""
        if self._retries is not None:
            self._retries.succeeded()

    def _is_passing(self, error: ExpertMeshError) -> bool:
        # A full queue may refuse a new request; one that it had accepted waits for room.
        is_full = isinstance(error, OverloadedError) and error.retry_after_s is not None
        return isinstance(error, UnavailableError) or (is_full and bool(self._choices))
