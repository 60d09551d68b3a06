"""The router replica: an engine, and one call per request, over a link or through Serve.

A call of ``generate`` lasts as long as its request. It returns the tokens of all choices when they
are finished; cancelling it ends the request. Meanwhile each engine step sends its new tokens to the
gateways, one frame per gateway (:mod:`router.messages.token_link`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import ray
import torch

from cluster.controller.application import app_is_wanted
from cluster.device import CPU, device_of
from cluster.errors import ExpertMeshError, ModelReplacedError, being_deleted
from cluster.processor import num_cpus
from cluster.transport.open import open_transport
from cluster.wire.tensors import TORCH_DTYPES
from experts.checkpoint.folder import language_model
from experts.checkpoint.remote.remote_files import open_model
from experts.checkpoint.remote.remote_reader import RayNeighbours
from router.config.deployment import ExpertsConfig, RouterConfig
from router.control.client import ControllerClient
from router.control.placement_view import PlacementView, PlacementWatcher
from router.control.readiness import is_its_turn
from router.engine.constraints import Grammars
from router.engine.device_room import warn_of_steps
from router.engine.emission import Emission
from router.engine.engine import Engine
from router.engine.kernel_class import dense_class, why_not_native
from router.engine.scheduling.prefixes import why_dependent
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.engine.stats import RouterSamples
from router.messages.call_link import call_server
from router.messages.link import LinkAddress
from router.messages.receipts import merge_events
from router.messages.request import GenerationRequest, TokenEvent
from router.messages.token_link import TokenSender
from router.model.model import MoEModel
from router.moe.capacity import CapacityLimit
from router.moe.combine import WeightedSums
from router.moe.dispatch import Dispatcher
from router.moe.layer import MoELayers
from router.observability.tracing import RequestTrace
from router.served import ServedModel

if TYPE_CHECKING:
    from llguidance import LLTokenizer

FINISH_CHECK_S = 0.05
ANNOUNCE_TIMEOUT_S = 1.0
"""How long the engine waits to tell a gateway that a request is computed alone."""

logger = logging.getLogger("expertmesh.router")


@dataclass(slots=True)
class _Request:
    """A running request: its events so far, and the future that its call waits for.

    ``wire_id`` is the gateway's id for the request. The engine uses a new id for every call, since
    Serve may repeat a call when it mistakes a slow connection for a broken one.
    """

    wire_id: str
    address: LinkAddress
    streamed: bool
    done: asyncio.Future[None]
    unfinished: int
    events: list[TokenEvent] = field(default_factory=list)


class RouterReplica:
    """Attention, gate and sampling of one model; its experts run in the expert actors."""

    def __init__(
        self,
        app: str,
        model: ServedModel,
        config: RouterConfig,
        experts: ExpertsConfig,
        controller: ControllerClient,
        vocabulary_of: Callable[[ServedModel], LLTokenizer] | None = None,
    ) -> None:
        """Load the model's dense part and start the engine; needs a running event loop.

        ``vocabulary_of`` loads a model's vocabulary, which requests with a grammar need.
        """
        torch.set_num_threads(config.threads)
        self._loop = asyncio.get_running_loop()
        self._requests: dict[str, _Request] = {}
        self._call_numbers = itertools.count()
        self._model = model
        self._is_deleted = False
        self._view = PlacementView()
        self._watcher = PlacementWatcher(
            "router",
            self._view,
            controller,
            partial(app_is_wanted, app),
            self._end_requests,
            lambda: self._samples(),  # set below, before the event loop runs the watcher
            model.key,
            lambda: self._kernel_class,  # as above
        )
        tls = None if experts.tls is None else experts.tls.files()
        self._transport = open_transport(app, experts.transport, tls)
        self._dispatcher = Dispatcher(
            model.key,
            self._view,
            self._transport,
            self._watcher.suspect,
            experts.call_timeout_s,
            heard=self._watcher.heard,
        )
        capacity = config.expert_capacity
        limit = None if capacity is None else CapacityLimit(capacity, model.num_experts)
        self._overflow: Mapping[tuple[int, int], int] = {} if limit is None else limit.overflow
        layers = MoELayers(self._dispatcher, WeightedSums(), limit)
        self._device = device_of(config.device, config.num_gpus, "args.router.device")
        dense, self._kernel_class = _load_dense(model, config, layers, self._device)
        is_independent = _is_independent(model, dense, layers)
        self._scheduler = Scheduler(
            _limits_of(config),
            dense.num_pages,
            dense.attention.page_size,
            dense.even_context,
            model.identity if config.prefix_cache and is_independent else None,
            is_independent,
        )
        self._grammars = None
        if vocabulary_of is not None:
            self._grammars = Grammars(partial(vocabulary_of, model), model.vocab_size)
        self._engine = Engine(
            dense,
            layers,
            self._scheduler,
            frozenset(model.eos_token_ids),
            self._emit,
            is_exact=not experts.emulated_pools,
            identity=model.identity,
            announce=self._announce,
            grammars=self._grammars,
        )
        self._samples = RouterSamples(
            model.id, self._engine.tally, self._scheduler, self._dispatcher, self._overflow
        )
        self._links = TokenSender(self._stop_choice, None if tls is None else tls.client_context())
        self._node = ray.get_runtime_context().get_node_id()
        self._server = call_server(self.generate, tls)
        self._engine.start()

    async def link(self, model: str, node: str) -> LinkAddress | None:
        """Return where a model's gateways can connect to call :meth:`generate` without Serve.

        ``model`` is the key of the gateway's model, ``node`` the id of its node. For a gateway on
        another node this router listens on TCP from now on. ``None`` if it has another model.
        """
        return await self._server.start(node) if model == self._model.key else None

    async def generate(self, wire: Mapping[str, Any]) -> dict[str, Any]:
        """Generate all choices of the ``request`` in ``wire``.

        Returns ``{"error": …}``, or ``{"events": […]}`` with one event for each choice: all its
        tokens except those that the request lists as received. With an error, ``"replaced": True``
        says that a router of another model may serve the request, and ``"has_other_text"`` whether
        the tokenizer is the reason. Meanwhile a streamed request's tokens go to the gateway's
        ``address`` in ``wire`` as they are sampled. For any other request only each choice's first
        tokens go there, without log probabilities of its prompt.
        """
        if self._is_deleted:
            return {"error": being_deleted().to_wire()}
        request = GenerationRequest.from_wire(wire["request"])
        address = LinkAddress.from_wire(wire["address"]).seen_from(self._node)
        if self._has_other_text(request) or not self._has_own_tokens(request):
            return _replaced(ModelReplacedError(), self._has_other_text(request))
        self._links.connect(address)
        unfinished = sum(not request.received_of(i).finished for i in range(request.sampling.n))
        pending = _Request(
            request.request_id, address, request.streamed, self._loop.create_future(), unfinished
        )
        request = replace(request, request_id=f"{request.request_id}/{next(self._call_numbers)}")
        self._requests[request.request_id] = pending
        self._engine.submit(request, RequestTrace.of_call())
        try:
            await pending.done
        except ModelReplacedError as error:
            return _replaced(error)
        except ExpertMeshError as error:
            return {"error": error.to_wire()}
        except asyncio.CancelledError:
            self._engine.cancel(request.request_id)
            raise
        finally:
            del self._requests[request.request_id]
        return {"events": [e.to_wire() for e in merge_events(pending.events)]}

    def _has_other_text(self, request: GenerationRequest) -> bool:
        """Return whether the request's token or expert ids come from another model."""
        model, routed = self._model, request.routed
        if routed is not None:
            shape = model.num_layers, model.num_experts_per_tok
            if (routed.shape, routed.num_experts) != (shape, model.num_experts):
                return True
        return request.text_identity not in ("", model.text_identity)

    def _has_own_tokens(self, request: GenerationRequest) -> bool:
        """Return whether this model generated the tokens received so far."""
        identities = {choice.identity for choice in request.received if choice.is_begun}
        return identities <= {self._model.identity}

    def is_its_turn(self) -> bool:
        """Return whether this router should serve yet (:mod:`router.control.readiness`)."""
        return is_its_turn(self._view.placement, self._model.key)

    def _end_requests(self) -> None:
        """End all requests; Serve waits for them before it ends a replica."""
        self._is_deleted = True
        for request_id, request in self._requests.items():
            self._engine.cancel(request_id)
            if not request.done.done():
                request.done.set_exception(being_deleted())

    def _stop_choice(self, wire_id: str, index: int) -> None:
        for request_id, request in self._requests.items():
            if request.wire_id == wire_id:
                self._engine.stop_choice(request_id, index)

    def _announce(self, request_id: str, is_alone: bool) -> bool:
        """Tell a request's gateway of a step of only that request; the engine waits for this."""
        request = self._requests.get(request_id)
        if request is None:  # it has ended
            return not is_alone
        sending = self._links.send_alone(request.address, request.wire_id, is_alone)
        try:
            return asyncio.run_coroutine_threadsafe(sending, self._loop).result(ANNOUNCE_TIMEOUT_S)
        except TimeoutError:
            return False

    def _emit(self, emissions: list[Emission]) -> None:
        """Pass a step's emissions from the engine's thread to the event loop."""
        self._loop.call_soon_threadsafe(self._deliver, emissions)

    def _deliver(self, emissions: list[Emission]) -> None:
        frames: defaultdict[LinkAddress, list[tuple[str, TokenEvent]]] = defaultdict(list)
        for emission in emissions:
            request = self._requests.get(emission.request_id)
            if request is None or request.done.done():
                continue
            if isinstance(emission.outcome, ExpertMeshError):
                request.done.set_exception(emission.outcome)
                continue
            request.events.append(emission.outcome)
            if request.streamed or emission.outcome.is_first_token:
                frames[request.address].append((request.wire_id, emission.outcome))
            request.unfinished -= emission.outcome.finish_reason is not None
            if request.unfinished == 0:
                request.done.set_result(None)
        for address, events in frames.items():
            self._links.send(address, events)

    def use(self) -> float:
        """Return the share of this replica's cache or batch in use; see :meth:`Scheduler.use`."""
        return self._scheduler.use()

    async def stats(self) -> dict[str, Any]:
        """Return this process's measurements.

        ``layer_s`` are the MoE layers' times (s) since the last call. ``retries`` are by reason,
        ``calls`` by transport. ``inexact_rows`` counts, by contract, token rows computed without
        an expert that the gate chose. ``overflow`` counts tokens by the (layer, expert) that had
        no room for them. ``replayed`` counts forced tokens by whether a step sampled an equal
        token; of tokens computed like a prompt's, only the last counts. ``device`` is the model's,
        ``kernel_class`` the class of its dense part.
        """
        latest_s = self._engine.tally.latest_layers_s
        layer_s = list(latest_s)
        latest_s.clear()
        return {
            "layer_s": layer_s,
            "retries": dict(self._dispatcher.retries),
            "calls": dict(self._transport.calls),
            "inexact_rows": dict(self._engine.inexact_rows),
            "overflow": dict(self._overflow),
            "pid": os.getpid(),
            "device": str(self._device),
            "kernel_class": self._kernel_class,
            "requests": len(self._requests),
            "replayed": dict(self._engine.replayed),
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def is_alive(self) -> bool:
        """Return whether the engine's thread is running."""
        return self._engine.is_alive()

    async def finish(self) -> None:
        """Return once no request is in flight; Serve does not know of those that came over links.

        Gateways learn within a second or two that a router is about to end. Serve bounds the wait.
        """
        while self._requests:
            await asyncio.sleep(FINISH_CHECK_S)

    def close(self) -> None:
        """Stop the engine after its current step, then the watcher and the links."""
        self._engine.close()
        if self._grammars is not None:
            self._grammars.close()
        self._watcher.stop()
        self._links.close()
        self._server.close()


def _load_dense(
    model: ServedModel,
    config: RouterConfig,
    layers: MoELayers[torch.Tensor],
    device: torch.device,
) -> tuple[MoEModel, str]:
    """Load the dense part from this node's disk or another node, and log where it runs.

    Returns it and its kernel class.
    """
    checkpoint = language_model(open_model(model.path, model.source.identity, RayNeighbours()))
    cache_tokens = config.cache_tokens_for(model.max_model_len)
    dtype = TORCH_DTYPES[model.dtype]
    threads = min(config.prefill_threads, num_cpus())
    dense = MoEModel(checkpoint, dtype, cache_tokens, layers, device, threads)
    dense.reserve(config.max_batch_tokens)
    kernel_class = dense_class(device, dtype, dense.is_native, dense.attention.name)
    warn_of_steps(model.id, checkpoint, dense, config, model.max_model_len, dtype, device)
    logger.info(
        "router of %s: %s on %s (%s), cache of %d tokens%s",
        model.id,
        model.dtype,
        device,
        kernel_class,
        dense.num_pages * dense.attention.page_size,
        "" if checkpoint.remote is None else f", {checkpoint.remote.summary()}",
    )
    if device == CPU and not dense.is_native:
        logger.info("router of %s: %s", model.id, why_not_native())
    return dense, kernel_class


def _is_independent(model: ServedModel, dense: MoEModel, layers: MoELayers[torch.Tensor]) -> bool:
    """Return whether keys and values depend only on tokens and weights; log why not."""
    reason = why_dependent(dense.is_independent, layers.has_limit)
    if reason:
        logger.info(
            "router of %s: no prefix cache, and resumed requests compute one token a step, "
            "because %s",
            model.id,
            reason,
        )
    return not reason


def _limits_of(config: RouterConfig) -> Limits:
    return Limits(
        config.max_batch_size,
        config.max_batch_tokens,
        config.max_queue_requests,
        config.max_queue_tokens,
    )


def _replaced(error: ModelReplacedError, has_other_text: bool = False) -> dict[str, Any]:
    return {"error": error.to_wire(), "replaced": True, "has_other_text": has_other_text}
