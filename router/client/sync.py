"""The synchronous client.

``generate`` and ``stream`` outlive a server: where the gateway, its proxy or the connection is lost
they ask again within their deadline, and a stream goes on from the tokens that it has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import grpc

from cluster.errors import ExpertMeshError, UnavailableError
from cluster.reports import ChangeReport, ClusterStatus, LoadStatus, RebalanceReport
from router.client.attempts import Attempts
from router.client.session import (
    CHANGE_TIMEOUT_S,
    DEFAULT_ADDRESS,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT_S,
    INFO_TIMEOUT_S,
    Session,
)
from router.client.types import Message, ModelInfo, Reply, Sampling
from router.client.wire import (
    CHANNEL_OPTIONS,
    call_options,
    change_of,
    choices_of,
    load_of,
    models_of,
    rebalance_of,
    reply_of,
    status_of,
)
from router.protos import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.retry import RetryPolicy


class Client:
    """Talks to one gateway address; a context manager, safe to use from several threads.

    ``retry`` says how ``generate`` and ``stream`` are tried again when no server answers or it says
    UNAVAILABLE: always within their ``timeout_s``, and all of a client's requests within one
    :class:`RetryBudget`. They then go with a seed that the client draws where none is given, so
    that another attempt comes to the same tokens. An address at which no server has ever answered
    is not tried again. ``None`` tries everything once.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, retry: RetryPolicy | None = DEFAULT_RETRY
    ) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._session = Session(address, retry)
        self._closed = threading.Event()
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._closed.set()
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> list[Reply]:
        """Return all choices of a prompt (text or token ids) or of ``messages``, by index.

        Exactly one of the two is given; the model's chat template renders messages, and what is
        generated is the assistant's next one. An empty ``model`` is the first that is served.
        ``on_expert_loss`` is ``strict``, ``next_expert`` or ``drop``; by default the deployment's.
        Raises :class:`ExpertMeshError`, and :class:`UnreachableError` when no server answers.
        """
        model = model or self._first_model()
        request = self._session.request(
            prompt, messages, sampling, model, timeout_s, on_expert_loss
        )
        attempts = self._session.attempts(request, timeout_s)
        with self._session.unknown_model_forgotten():
            while True:
                try:
                    answer = self._generate(attempts)
                except ExpertMeshError as error:
                    self._wait(attempts.failed(error), error)
                else:
                    attempts.succeeded()
                    return choices_of(answer)

    def _generate(self, attempts: Attempts) -> Any:
        request, options = attempts.request(), call_options(attempts)
        return self._call(lambda: self._inference.Generate(request, **options))

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> Generator[Reply, None, None]:
        """Yield pieces of all choices as they come; leaving the loop cancels the request.

        No token is left out or comes twice when the stream breaks and goes on. Raises as
        :meth:`generate` does, at any piece.
        """
        model = model or self._first_model()
        request = self._session.request(
            prompt, messages, sampling, model, timeout_s, on_expert_loss
        )
        attempts = self._session.attempts(request, timeout_s)
        with self._session.unknown_model_forgotten():
            while not attempts.all_finished():
                try:
                    yield from self._stream(attempts)
                except ExpertMeshError as error:
                    if not attempts.all_finished():  # else nothing is missing
                        self._wait(attempts.failed(error), error)
            attempts.succeeded()

    def _stream(self, attempts: Attempts) -> Iterator[Reply]:
        """Yield what one attempt brings; raises unless it brings the end of every choice."""
        call = self._inference.GenerateStream(attempts.request(), **call_options(attempts))
        try:
            while (message := self._call(lambda: next(call, None))) is not None:
                reply = reply_of(message)
                attempts.took(reply.index, reply.token_ids, reply.finish_reason, reply.exact)
                yield reply
        finally:
            call.cancel()
        if not attempts.all_finished():
            raise UnavailableError("the stream ended before its last token")

    def _wait(self, delay_s: float, error: ExpertMeshError) -> None:
        """Wait; raises ``error`` where there never was a server or the client is closed."""
        if not self._session.was_reached or self._closed.wait(delay_s):
            raise error

    def model_info(self, model: str = "") -> list[ModelInfo]:
        """Return one model's numbers, or those of all served models when none is named."""
        request = inference_pb2.GetModelInfoRequest(model=model)
        answer = self._call(lambda: self._inference.GetModelInfo(request, timeout=INFO_TIMEOUT_S))
        return models_of(answer)

    def status(self) -> ClusterStatus:
        """Return what the controller knows of the cluster."""
        request = admin_pb2.GetStatusRequest()
        answer = self._call(lambda: self._admin.GetStatus(request, timeout=INFO_TIMEOUT_S))
        return status_of(answer)

    def load(self) -> LoadStatus:
        """Return the load of experts and devices lately, and the last rebalancings."""
        request = admin_pb2.GetLoadRequest()
        return load_of(self._call(lambda: self._admin.GetLoad(request, timeout=INFO_TIMEOUT_S)))

    def rebalance(self, dry_run: bool = False) -> RebalanceReport:
        """Have copies of experts follow the load, or with ``dry_run`` only be told how.

        Returns when that is done; raises :class:`UnavailableError` while experts lack copies.
        """
        request = admin_pb2.RebalanceRequest(dry_run=dry_run)
        call = partial(self._admin.Rebalance, request, timeout=CHANGE_TIMEOUT_S)
        return rebalance_of(self._call(call))

    def scale(self, actors: int, pool: str = "", dry_run: bool = False) -> ChangeReport:
        """Have a pool of so many actors, or with ``dry_run`` only be told what that would move.

        Returns when experts are spread over them, or while Ray finds no device for one. Raises
        :class:`InvalidRequestError` where the number is out of bounds or experts do not fit.
        """
        request = admin_pb2.ScaleRequest(actors=actors, pool=pool, dry_run=dry_run)
        call = partial(self._admin.Scale, request, timeout=CHANGE_TIMEOUT_S)
        return change_of(self._call(call))

    def drain(self, target: str, dry_run: bool = False) -> ChangeReport:
        """Empty and end an actor, or those of a node (its id, or the first characters of it).

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.DrainRequest(target=target, dry_run=dry_run)
        call = partial(self._admin.Drain, request, timeout=CHANGE_TIMEOUT_S)
        return change_of(self._call(call))

    def set_copies(
        self, model: str, layer: int, expert: int, copies: int, dry_run: bool = False
    ) -> ChangeReport:
        """Bring one expert to so many copies, until a rebalancing finds others better.

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.SetCopiesRequest(
            model=model, layer=layer, expert=expert, copies=copies, dry_run=dry_run
        )
        call = partial(self._admin.SetCopies, request, timeout=CHANGE_TIMEOUT_S)
        return change_of(self._call(call))

    def _call(self, work: Callable[[], Any]) -> Any:
        try:
            answer = work()
        except grpc.RpcError as error:
            raise self._session.failed(error) from None
        self._session.was_reached = True
        return answer

    def _first_model(self) -> str:
        # Asked for once: a call before each call would be a second round trip for every answer.
        if not self._session.first_model:
            self._session.first_model = self.model_info()[0].id
        return self._session.first_model
