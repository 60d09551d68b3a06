"""The synchronous client; ``python -m tests.sync_client`` makes it of ``aio.py``.

``generate``, ``stream`` and ``predict`` survive the loss of a gateway, its proxy or the connection:
they retry within their deadline, and a stream resumes after the tokens that have arrived.
"""

from __future__ import annotations

from collections.abc import Generator, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from cluster.errors import ExpertMeshError
from cluster.reports import ChangeReport, ClusterStatus, LoadStatus, RebalanceReport, UsageReport
from router.client.admin import report_of
from router.client.attempts import Attempts, RequestAttempts
from router.client.session import (
    DEFAULT_ADDRESS,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT_S,
    SyncSession,
)
from router.client.tls import ClientTls
from router.client.types import (
    Message,
    MixtureInfo,
    ModelInfo,
    Prediction,
    Reply,
    RequestOptions,
    Sampling,
    Token,
)
from router.client.wire import (
    conversation,
    first_model,
    generate_request,
    models_of,
    sendable,
    tokens_of,
)
from router.protos import admin_pb2, inference_pb2
from router.retry import RetryPolicy

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_INFO_TIMEOUT_S = 10.0
_CHANGE_TIMEOUT_S = 930.0
"""Longer than a gateway waits, so that its own error comes first."""


class Client:
    """Talks to one gateway address; a thread-safe context manager.

    A cancelled task's request is cancelled at the server.

    ``generate``, ``stream`` and ``predict`` are retried by ``retry`` when no server answers or it
    answers UNAVAILABLE. Retries end with the request's ``timeout_s``, and all requests of a client
    share one :class:`RetryBudget`. The client draws a seed where none is given, so that another
    attempt gives the same tokens. An address that has never taken a connection is not tried again.
    A ``retry`` of ``None`` makes a single attempt.

    ``api_key`` is sent with every call, by default the one in ``EXPERTMESH_API_KEY``.
    ``admin_address`` is where gateways answer operators (``status``, ``scale`` and so on), by
    default the port after that of ``address``. ``tls`` encrypts both, by default as
    ``EXPERTMESH_TLS_CA``, ``_CERT`` and ``_KEY`` say; without it connections are not encrypted.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retry: RetryPolicy | None = DEFAULT_RETRY,
        api_key: str | None = None,
        admin_address: str | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._session = SyncSession(address, retry, api_key, admin_address, tls)

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight raise :class:`UnreachableError`."""
        self._session.close()

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[RequestOptions],
    ) -> list[Reply]:
        """Return all choices of a prompt (text or token ids) or of ``messages``, by index.

        Exactly one of the two is given. The model's chat template renders ``messages``, and the
        reply is the assistant's next message. An empty ``model`` is the first served model. The
        ``options`` are those of :class:`RequestOptions`: ``on_expert_loss``, ``priority`` and
        ``cache_salt``. Raises :class:`ExpertMeshError`, and :class:`UnreachableError` when no
        server answers.
        """
        model = model or self._first_model()
        request = generate_request(prompt, messages, sampling, model, timeout_s, options)
        attempts = Attempts(request, timeout_s, self._session.retries())
        with self._session.unknown_model_forgotten():
            return attempts.whole(self._retried(attempts, self._session.inference.Generate))

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[RequestOptions],
    ) -> Generator[Reply, None, None]:
        """Yield pieces of all choices as they come; see :meth:`generate` for the arguments.

        A stream that breaks and resumes neither loses nor repeats a token. Closing the generator,
        as ``contextlib.closing`` does, cancels the request. Leaving the loop early cancels it when
        Python finalises the generator. Raises as :meth:`generate` does, at any piece.
        """
        model = model or self._first_model()
        request = generate_request(prompt, messages, sampling, model, timeout_s, options)
        attempts = Attempts(request, timeout_s, self._session.retries())
        with self._session.unknown_model_forgotten():
            while not attempts.all_finished():
                call = attempts.start(self._session.inference.GenerateStream)
                try:
                    while (message := self._session.read(call)) is not None:
                        yield attempts.piece(message)
                    attempts.check_finished()
                except ExpertMeshError as error:
                    if not attempts.all_finished():  # else nothing is missing
                        self._wait(attempts, error)
                finally:
                    call.cancel()
            attempts.succeeded()

    def predict(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        outputs: Sequence[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> Prediction:
        """Return a mixture's outputs for the rows of ``inputs``, arrays [P, *shape] by name.

        The dtypes are the inputs' own; :meth:`mixture_info` returns them. ``outputs`` are the names
        of the wanted outputs; by default all. ``on_expert_loss`` is as in :class:`RequestOptions`.
        Raises :class:`ExpertMeshError`, and :class:`UnreachableError` when no server answers.
        """
        from router.client.prediction import PredictionAttempts, request_of

        request = request_of(model, inputs, outputs, on_expert_loss)
        attempts = PredictionAttempts(request, timeout_s, self._session.retries())
        method = self._session.predictions.ModelInfer
        return attempts.whole(self._retried(attempts, method))

    def mixture_info(self, model: str) -> MixtureInfo:
        """Return the description of a served mixture."""
        from router.client.prediction import info_of, metadata_request

        method = self._session.predictions.ModelMetadata
        return info_of(self._ask(method, metadata_request(model)))

    def model_info(self, model: str = "") -> list[ModelInfo]:
        """Return the description of one model, or of all served models if none is named."""
        request = inference_pb2.GetModelInfoRequest(model=model)
        return models_of(self._ask(self._session.inference.GetModelInfo, request))

    def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Message] = (), model: str = ""
    ) -> tuple[int, ...]:
        """Return the token ids of a prompt, or of messages as the model's template renders them.

        Raises :class:`ExpertMeshError`.
        """
        model = model or self._first_model()
        with sendable():
            request = inference_pb2.TokenizeRequest(
                model=model, prompt=prompt, messages=conversation(messages)
            )
        reply = self._ask(self._session.inference.Tokenize, request)
        return tuple(reply.token_ids)

    def detokenize(self, token_ids: Sequence[int], model: str = "") -> str:
        """Return the text of token ids, special ones by their names; raises as :meth:`tokenize`."""
        reply = self._detokenized(token_ids, model)
        return str(reply.text)

    def tokens(self, token_ids: Sequence[int], model: str = "") -> tuple[Token, ...]:
        """Return the single tokens of ids, with their texts; raises as :meth:`tokenize`."""
        return tokens_of(token_ids, self._detokenized(token_ids, model))

    def status(self) -> ClusterStatus:
        """Return the processes of the cluster, and the experts of each actor."""
        return self._administer("GetStatus", admin_pb2.GetStatusRequest())

    def load(self) -> LoadStatus:
        """Return the recent load of experts and devices, and the last rebalancings."""
        return self._administer("GetLoad", admin_pb2.GetLoadRequest())

    def usage(self) -> UsageReport:
        """Return what the keys of each name have used at all gateways that run."""
        return self._administer("GetUsage", admin_pb2.GetUsageRequest())

    def rebalance(self, dry_run: bool = False) -> RebalanceReport:
        """Move and copy experts to follow the load; with ``dry_run``, only report the changes.

        Returns when the changes are done. Raises :class:`UnavailableError` while experts are
        missing.
        """
        request = admin_pb2.RebalanceRequest(dry_run=dry_run)
        return self._administer("Rebalance", request, _CHANGE_TIMEOUT_S)

    def scale(self, actors: int, pool: str = "", dry_run: bool = False) -> ChangeReport:
        """Bring a pool to a number of actors; with ``dry_run``, only report the changes.

        Returns when the experts are spread over the actors, or while an actor waits for a device.
        Raises :class:`InvalidRequestError` if the number is out of bounds or the experts do not
        fit.
        """
        request = admin_pb2.ScaleRequest(actors=actors, pool=pool, dry_run=dry_run)
        return self._administer("Scale", request, _CHANGE_TIMEOUT_S)

    def drain(self, target: str, dry_run: bool = False) -> ChangeReport:
        """Empty and end an actor, or all actors of a node, given by its id or the id's beginning.

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.DrainRequest(target=target, dry_run=dry_run)
        return self._administer("Drain", request, _CHANGE_TIMEOUT_S)

    def set_copies(
        self, model: str, layer: int, expert: int, copies: int, dry_run: bool = False
    ) -> ChangeReport:
        """Bring one expert to a number of copies, until a rebalancing changes it again.

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.SetCopiesRequest(
            model=model, layer=layer, expert=expert, copies=copies, dry_run=dry_run
        )
        return self._administer("SetCopies", request, _CHANGE_TIMEOUT_S)

    def set_all_copies(self, model: str, copies: int, dry_run: bool = False) -> ChangeReport:
        """Bring all experts of a model to a number of copies, as :meth:`set_copies` does one."""
        request = admin_pb2.SetCopiesRequest(
            model=model, copies=copies, dry_run=dry_run, all_experts=True
        )
        return self._administer("SetCopies", request, _CHANGE_TIMEOUT_S)

    def _retried(self, attempts: RequestAttempts, method: Callable[..., Any]) -> Any:
        """Return the reply of the first attempt that succeeds."""
        while True:
            try:
                return self._session.answer(partial(attempts.start, method))
            except ExpertMeshError as error:
                self._wait(attempts, error)

    def _wait(self, attempts: RequestAttempts, error: ExpertMeshError) -> None:
        """Wait for the next attempt; raises ``error`` if there is none.

        An address that has never taken a connection is not tried again.
        """
        if not self._session.was_reached:
            raise error
        self._session.wait(attempts.failed(error), error)

    def _ask(self, method: Callable[..., Any], request: Any) -> Any:
        """Return the reply of a call without retries."""
        return self._session.answer(partial(method, request, timeout=_INFO_TIMEOUT_S))

    def _administer(self, name: str, request: Any, timeout_s: float = _INFO_TIMEOUT_S) -> Any:
        """Return the report of a method of the Admin service, which is called once."""
        call = partial(getattr(self._session.admin, name), request, timeout=timeout_s)
        return report_of(self._session.answer(call, self._session.admin_place))

    def _detokenized(self, token_ids: Sequence[int], model: str) -> Any:
        model = model or self._first_model()
        with sendable():
            request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._ask(self._session.inference.Detokenize, request)

    def _first_model(self) -> str:
        # Remembered, since asking before each request would double the round trips.
        if not self._session.first_model:
            self._session.first_model = first_model(self.model_info()).id
        return self._session.first_model
