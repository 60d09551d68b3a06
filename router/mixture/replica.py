"""The replica of a mixture's router: gate and combination; the experts are in the expert actors."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch

from cluster.controller.application import app_is_wanted
from cluster.errors import CheckpointError, ExpertMeshError, ModelReplacedError, being_deleted
from cluster.transport.open import open_transport
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.remote.remote_files import open_model
from experts.checkpoint.remote.remote_reader import RayNeighbours
from experts.mixture.spec import interface_of
from router.config.deployment import ExpertsConfig, RouterConfig
from router.control.client import ControllerClient
from router.control.placement_view import PlacementView, PlacementWatcher
from router.control.readiness import is_its_turn
from router.messages.call_link import call_server
from router.messages.link import LinkAddress
from router.messages.prediction import PredictionRequest
from router.mixture.engine import MixtureEngine
from router.mixture.gate import MixtureGate
from router.mixture.gather import GatherRows, answer_shape_of
from router.mixture.queue import Outcome, QueueLimits, WorkQueue
from router.mixture.stats import MixtureSamples
from router.moe.dispatch import Dispatcher
from router.moe.layer import MoELayers
from router.moe.permute import PlacedModel
from router.moe.shared_load import SharedLoad
from router.served import ServedMixture

LANES = 8
"""Steps that may wait for experts at one time; as many devices work for one replica's requests."""
STEP_ROWS = 2
"""The rows of a step for each token of ``max_batch_tokens``: a row of a mixture is smaller."""
ROW_BYTES = 1024
"""A row costs an expert as much as so many bytes of its file, besides the file's own."""
FINISH_S, FINISH_CHECK_S = 10.0, 0.05

logger = logging.getLogger("expertmesh.router")


class MixtureReplica:
    """One router of a mixture; needs a running event loop."""

    def __init__(
        self,
        app: str,
        model: ServedMixture,
        config: RouterConfig,
        experts: ExpertsConfig,
        controller: ControllerClient,
    ) -> None:
        """Load the gates and start the engine.

        Raises :class:`CheckpointError` when the folder is not that of the served mixture.
        """
        torch.set_num_threads(config.threads)
        self._loop = asyncio.get_running_loop()
        self._call_numbers = itertools.count()
        self._model = model
        self._is_deleted = False
        self._requests: dict[str, asyncio.Future[Outcome]] = {}
        view = self._view = PlacementView()
        self._watcher = PlacementWatcher(
            "router",
            view,
            controller,
            partial(app_is_wanted, app),
            self._end_requests,
            lambda: self._samples(),  # set below, before the event loop runs the watcher
            model.key,
        )
        mixture = open_model(model.path, model.source.identity, RayNeighbours())
        if not isinstance(mixture, Mixture):
            raise CheckpointError("is a language model, not a mixture", str(mixture.folder))
        tls = None if experts.tls is None else experts.tls.files()
        answer_shape = partial(answer_shape_of, mixture.spec)
        load = SharedLoad(row_costs(mixture))
        self._dispatchers = [
            Dispatcher(
                model.key,
                view,
                open_transport(app, experts.transport, tls),
                self._watcher.suspect,
                experts.call_timeout_s,
                answer_shape,
                load,
                self._watcher.heard,
            )
            for _ in range(LANES)
        ]
        self._max_requests = config.max_batch_size
        self._interface = interface_of(mixture.spec)
        self._queue = WorkQueue(_limits_of(config), mixture.spec.rows_input.name)
        self._engine = MixtureEngine(
            mixture.spec,
            MixtureGate(mixture),
            PlacedModel(model.key, view),
            [MoELayers(dispatcher, GatherRows(answer_shape)) for dispatcher in self._dispatchers],
            self._queue,
            load,
            model.identity,
            is_exact=not experts.emulated_pools,
        )
        self._server = call_server(self.predict, tls)
        self._samples = MixtureSamples(model.id, self._engine.tally, self._queue, self._dispatchers)
        self._engine.start()
        logger.info("router of %s: a mixture of %d experts", model.id, len(mixture.spec.experts))

    async def link(self, model: str, node: str) -> LinkAddress | None:
        """Return where the gateways of a model can connect, to call :meth:`predict` without Serve.

        ``model`` is the key of the gateway's model, ``node`` the id of its node; for a gateway on
        another node this router listens by TCP from now on. ``None`` where it has another model.
        """
        return await self._server.start(node) if model == self._model.key else None

    async def predict(self, wire: Mapping[str, Any]) -> dict[str, Any]:
        """Predict for all rows of a request.

        Returns ``{"reply": …}`` or ``{"error": …}``; with an error, ``"replaced": True`` says that
        a router of another mixture may serve the request, and ``"has_other_interface": True`` that
        a gateway has checked it by other inputs and outputs than this mixture's. A cancellation
        ends the request.
        """
        if self._is_deleted:
            return {"error": being_deleted().to_wire()}
        request = PredictionRequest.from_wire(wire)
        if request.interface != self._interface:
            return _failed(ModelReplacedError()) | {"has_other_interface": True}
        # Serve may repeat a call when it mistakes a slow connection for a broken one.
        request = replace(request, request_id=f"{request.request_id}/{next(self._call_numbers)}")
        outcome: asyncio.Future[Outcome] = self._loop.create_future()
        self._requests[request.request_id] = outcome
        try:
            self._engine.submit(request, partial(self._deliver, outcome))
            result = await outcome
        except ExpertMeshError as error:
            result = error
        except asyncio.CancelledError:
            self._engine.cancel(request.request_id)
            raise
        finally:
            del self._requests[request.request_id]
        if isinstance(result, ExpertMeshError):
            return _failed(result)
        return {"reply": result.to_wire()}

    def _deliver(self, future: asyncio.Future[Outcome], outcome: Outcome) -> None:
        """Pass an outcome from a thread of the engine to the event loop."""
        self._loop.call_soon_threadsafe(_set_result, future, outcome)

    def is_its_turn(self) -> bool:
        """Return whether this router is to serve yet (:mod:`router.control.readiness`)."""
        return is_its_turn(self._view.placement, self._model.key)

    def _end_requests(self) -> None:
        """End all requests; Serve waits for them before it ends a replica."""
        self._is_deleted = True
        for request_id, outcome in self._requests.items():
            self._engine.cancel(request_id)
            _set_result(outcome, being_deleted())

    def use(self) -> float:
        """Return the requests under way and waiting over those that are computed together."""
        return len(self._queue.jobs) / self._max_requests

    async def stats(self) -> dict[str, Any]:
        """Return measurements as :meth:`router.engine.replica.RouterReplica.stats` does."""
        tally = self._engine.tally
        layer_s = list(tally.latest_layers_s)
        tally.latest_layers_s.clear()
        return {
            "layer_s": layer_s,
            "retries": dict(self._samples.retries()),
            "calls": dict(self._samples.calls()),
            "inexact_rows": dict(tally.inexact_rows),
            "pid": os.getpid(),
            "requests": len(self._requests),
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def is_alive(self) -> bool:
        """Return whether the engine's threads run."""
        return self._engine.is_alive()

    async def finish(self) -> None:
        """Return once no request is under way, or after :data:`FINISH_S`.

        Serve knows nothing of the requests over links, and gateways come to know within a second or
        two that a router is to end. Those that are left then are sent to another router.
        """
        until_s = time.monotonic() + FINISH_S
        while self._requests and time.monotonic() < until_s:
            await asyncio.sleep(FINISH_CHECK_S)

    def close(self) -> None:
        """Stop the engine after its current steps, then the watcher and the links."""
        self._engine.close()
        self._watcher.stop()
        self._server.close()


def _limits_of(config: RouterConfig) -> QueueLimits:
    return QueueLimits(
        config.max_batch_size,
        STEP_ROWS * config.max_batch_tokens,
        config.max_batch_size + config.max_queue_requests,
        config.max_queue_tokens,
    )


def row_costs(mixture: Mixture) -> list[int]:
    """Return what a row costs each expert: the bytes of its file, which its row goes through.

    That is right for layers, support vectors and neighbours, and too much for trees.
    """
    sizes = [mixture.tensors[part.file].num_bytes for part in mixture.spec.experts.values()]
    return [ROW_BYTES + size for size in sizes]


def _failed(error: ExpertMeshError) -> dict[str, Any]:
    return {"error": error.to_wire(), "replaced": isinstance(error, ModelReplacedError)}


def _set_result(future: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not future.done():
        future.set_result(outcome)
