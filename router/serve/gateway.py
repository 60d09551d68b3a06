"""The gateway as a Serve deployment class: one replica listens for HTTP and gRPC by itself."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.controller.application import app_is_wanted, is_replaced_later
from cluster.reports import ProcessSamples, ProcessStatus, Samples
from cluster.tls import TlsFiles
from experts.checkpoint.remote.remote_reader import RayNeighbours
from router.config.deployment import GatewayConfig
from router.config.listen import ListenConfig
from router.gateway.admin import Admin
from router.gateway.grpc.methods import ADMIN_SERVICE, HEALTH_SERVICE, SERVICES, GrpcMethods
from router.gateway.http.app import create_app
from router.gateway.http_io import BrowserRules
from router.gateway.input.tokenizer import load_models
from router.gateway.limits.charges import Charges
from router.gateway.limits.room import GRACE_S, Room
from router.gateway.listen.listeners import Listeners, Surface
from router.gateway.metrics import Metrics, access_log
from router.gateway.predict.service import PredictionService
from router.gateway.predict.upstream import Predictions
from router.gateway.predict.v2_grpc import PredictionHandlers
from router.gateway.service import GenerationService
from router.gateway.upstream.affinity import keys_of_call, no_keys
from router.gateway.upstream.deployment import Deployment
from router.gateway.upstream.ray_upstream import RayUpstream
from router.gateway.upstream.router_links import RouterCalls
from router.observability import catalogue
from router.security.access import Access
from router.security.certificates import Certificates
from router.security.config import SecurityConfig
from router.security.keyring import Keyring
from router.security.reach import check_listen, is_loopback
from router.serve.autoscaling import USE
from router.serve.process import (
    collector_paused,
    failures_logged,
    setup_logging,
    take_turns,
    torch_hidden,
)
from router.served import Served, ServedMixture, ServedModel

ENDED_S = 2.0
"""How long clients of a deleted application may read how their requests ended."""


class GatewayReplica:
    """One gateway process for all models, with the tokenizers and without weights."""

    _listeners: Listeners | None = None

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        models: tuple[Served, ...],
        limits: GatewayConfig,
        controller: DeploymentHandle,
        routers: Mapping[str, DeploymentHandle],
        max_held: int,
        tls: TlsFiles | None,
        security: SecurityConfig,
        shares_prefixes: bool,
    ) -> None:
        """Load the tokenizers, follow the controller, and listen once it is this gateway's turn.

        Raises :class:`cluster.errors.ConfigError` where this process would listen wider than
        ``security`` allows, has no keys or no certificate to read, or cannot have its ports.

        Serve puts handles in the place of ``controller`` and ``routers`` (by model id), which are
        bound deployments when the application is built. ``max_held`` is the number of choices
        that the routers of one language model hold, and of pieces of requests that those of a
        mixture hold. ``models`` are both. ``tls`` encrypts links to routers. ``shares_prefixes``
        says that routers keep prompts' beginnings, so that requests are to follow them.
        """
        setup_logging()
        take_turns()
        access_log.setLevel(logging.INFO if limits.access_log else logging.WARNING)
        metrics = Metrics()
        charges = Charges(metrics)
        with failures_logged("a gateway"):
            self._let_in(limits.listen, security, metrics)

        def samples() -> Samples:
            own = {"problem": self._problem(), "uses": charges.uses(), "deployment": deployment}
            return replace(metrics.samples(), **own)

        replica = serve.get_replica_context()
        application, deployment = replica.app_name, replica.deployment
        language_models = tuple(model for model in models if isinstance(model, ServedModel))
        mixtures = {model.id: model for model in models if isinstance(model, ServedMixture)}
        context = ray.get_runtime_context()
        node = context.get_node_id()
        self._deployment = Deployment(
            controller,
            [model.id for model in models],
            limits.on_expert_loss,
            partial(app_is_wanted, application),
            partial(is_replaced_later, application, deployment),
            samples,
            charges.hear,
        )
        self._room = Room(limits, [model.id for model in models])
        process = ProcessStatus(os.getpid(), node)
        admin = Admin(controller, lambda: ProcessSamples("gateway", process, samples()))
        with collector_paused(), torch_hidden():  # transformers is imported for its tokenizers
            loaded = load_models(language_models, RayNeighbours())
        calls = _calls_to(models, routers, node, tls, metrics, shares_prefixes)
        self._service = GenerationService(
            loaded,
            limits,
            RayUpstream(
                self._deployment, calls, max_held, None if tls is None else tls.server_context()
            ),
            metrics,
            self._room,
            charges,
            tuple(mixtures),
        )
        predictions = PredictionService(
            mixtures,
            limits,
            Predictions(self._deployment, calls, max_held),
            metrics,
            self._room,
            charges,
            tuple(loaded),
        )
        listeners = self._make_listeners(limits, predictions, admin)
        gc.freeze()  # all this lives as long as the process; collections skip it from here on
        await self._deployment.take_turn([model.key for model in models])
        with failures_logged("a gateway"):
            await listeners.open(f"{application} of Ray session {context.get_session_name()}")
        self._listeners = listeners

    def _let_in(self, listen: ListenConfig, security: SecurityConfig, metrics: Metrics) -> None:
        """Find out who is let in; follow changes of the keys and the certificate."""
        check_listen(listen.hosts(), security, "gateway.listen")
        keyring = None if security.keys_file is None else Keyring(Path(security.keys_file))
        self._access = Access(keyring, metrics.refused_caller)
        self._certificates = None if listen.tls is None else Certificates(listen.tls.files())
        if keyring is not None:
            self._following = asyncio.create_task(keyring.follow(), name="keys")

    def _make_listeners(
        self, limits: GatewayConfig, predictions: PredictionService, admin: Admin
    ) -> Listeners:
        browsers = BrowserRules(is_loopback(limits.listen.host), limits.hosts, limits.origins)
        methods = GrpcMethods(self._service, admin, PredictionHandlers(predictions))
        return Listeners(
            limits.listen,
            create_app(self._service, predictions, admin, self._access, browsers),
            Surface(methods.for_clients(), (*SERVICES, HEALTH_SERVICE.full_name)),
            Surface(methods.for_operators(), (ADMIN_SERVICE.full_name,)),
            self._access,
            limits.max_body_bytes,
            self._certificates,
        )

    def _problem(self) -> str:
        """Return what is wrong with the files of keys and certificate, as they are now."""
        certificates = self._certificates
        problems = [self._access.problem, "" if certificates is None else certificates.problem]
        return "; ".join(filter(None, problems))

    async def shut_down(self, ends_requests: bool) -> tuple[int, float]:
        """Refuse new requests with UNAVAILABLE and a retry hint from now on.

        Requests under way go on, or end with the same error where ``ends_requests``. Returns their
        number, and the longest time (s) that a request may take. May be called again.
        :mod:`router.ops.startup.drain` calls it by its name.
        """
        self._deployment.refuse_new_requests()
        if ends_requests:
            self._deployment.end_requests()
        limit_s = self._service.limits.max_timeout_s + GRACE_S
        return self._room.places.taken, limit_s

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the use of this gateway to Serve, which calls this method by its name."""
        return {USE: self._room.use()}

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica.

        On a redeploy that is when its successors start, so that this gateway goes on until they
        listen.
        """
        if self._listeners is not None:
            hands_over = await self._deployment.wait_for_successors()
            is_deleted = self._deployment.is_deleted
            grace_s = ENDED_S if is_deleted else self._service.limits.max_timeout_s
            await self._listeners.close(grace_s, hands_over=hands_over and not is_deleted)


def _calls_to(
    models: tuple[Served, ...],
    routers: Mapping[str, DeploymentHandle],
    node: str,
    tls: TlsFiles | None,
    metrics: Metrics,
    shares_prefixes: bool,
) -> dict[str, RouterCalls]:
    """Return the calls to the routers of each model; arguments as of :class:`GatewayReplica`."""
    context = None if tls is None else tls.client_context()
    calls: dict[str, RouterCalls] = {}
    for model in models:
        is_mixture = isinstance(model, ServedMixture)
        calls[model.id] = RouterCalls(
            routers[model.id],
            model.key,
            node,
            "predict" if is_mixture else "generate",
            context,
            partial(metrics.count, catalogue.ROUTER_CALLS, model.id),
            keys_of_call if shares_prefixes and not is_mixture else no_keys,
        )
    return calls
