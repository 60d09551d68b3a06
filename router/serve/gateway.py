"""The gateway as a Serve deployment class: one replica serves HTTP and gRPC."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.controller.application import app_is_wanted
from cluster.reports import ProcessSamples, ProcessStatus, Samples
from cluster.tls import TlsFiles
from router.config import GatewayConfig
from router.gateway.admin import Admin
from router.gateway.affinity import keys_of_call, no_keys
from router.gateway.app import create_app
from router.gateway.browsers import BrowserRules
from router.gateway.charges import Charges
from router.gateway.deployment import Deployment
from router.gateway.grpc.handlers import GrpcHandlers
from router.gateway.grpc.server import CLIENTS, OPERATORS, GrpcServer, Surface
from router.gateway.grpc.service import GrpcMethods
from router.gateway.limits import GRACE_S, Room
from router.gateway.metrics import Metrics
from router.gateway.models import load_models
from router.gateway.predict.service import PredictionService
from router.gateway.predict.upstream import Predictions
from router.gateway.predict.v2_grpc import PredictionHandlers
from router.gateway.ray_upstream import RayUpstream
from router.gateway.router_links import RouterCalls
from router.gateway.service import GenerationService
from router.security.access import Access
from router.security.config import SecurityConfig
from router.security.keyring import Keyring
from router.security.reach import check_reach, is_loopback
from router.serve.autoscaling import USE
from router.serve.encryption import certificates_in, check_encryption
from router.serve.instance import admin_address, own_grpc_address
from router.serve.listening import (
    describe_nothing,
    narrow_serve,
    serves_host,
    serves_http,
    share_no_port,
)
from router.serve.process import collector_paused, setup_logging, take_turns, torch_hidden
from router.served import Served, ServedMixture, ServedModel

MESSAGE_ROOM = 4
"""A gRPC message up to so many times ``gateway.max_body_bytes`` is read, to be refused by name."""


class GatewayReplica(GrpcMethods):
    """One gateway process for all models, with the tokenizers and without weights.

    Serve builds the HTTP app after the constructor (``__serve_build_asgi_app__``), so nothing of
    it is ever pickled.
    """

    def __init__(
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
        """Load the tokenizers and follow the controller; needs a running event loop.

        Raises :class:`cluster.errors.ConfigError` where this process would listen wider than
        ``security`` allows, or has no keys or no certificate to read.

        Serve puts handles in the place of ``controller`` and ``routers`` (by model id), which are
        bound deployments when the application is built. ``max_held`` is the number of choices
        that the routers of one language model hold, and of pieces of requests that those of a
        mixture hold. ``models`` are both. ``tls`` encrypts links to routers. ``shares_prefixes``
        says that routers keep prompts' beginnings, so that requests are to follow them.
        """
        setup_logging()
        take_turns()
        metrics = Metrics()
        charges = Charges(metrics)
        self._close(limits, security, metrics)

        def samples() -> Samples:
            return replace(metrics.samples(), problem=self._problem(), uses=charges.uses())

        language_models = tuple(model for model in models if isinstance(model, ServedModel))
        mixtures = {model.id: model for model in models if isinstance(model, ServedMixture)}
        self._keys = [model.key for model in models]
        self._deployment = Deployment(
            controller,
            [model.id for model in models],
            limits.on_expert_loss,
            partial(app_is_wanted, serve.get_replica_context().app_name),
            samples,
            charges.hear,
        )
        self._room = Room(limits, [model.id for model in models])
        node = ray.get_runtime_context().get_node_id()
        process = ProcessStatus(os.getpid(), node)
        self.admin = Admin(controller, lambda: ProcessSamples("gateway", process, samples()))
        with collector_paused(), torch_hidden():  # transformers is imported for its tokenizers
            loaded = load_models(language_models)
        calls = _calls_to(models, routers, node, tls, metrics, shares_prefixes)
        self.service = GenerationService(
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
        self.predictions = PredictionService(
            mixtures,
            limits,
            Predictions(self._deployment, calls, max_held),
            metrics,
            self._room,
            charges,
            tuple(loaded),
        )
        self.grpc_handlers = GrpcHandlers(self.service, self.admin)
        self.prediction_handlers = PredictionHandlers(self.predictions)

    def _close(self, limits: GatewayConfig, security: SecurityConfig, metrics: Metrics) -> None:
        """Let Serve open nothing here but for whom ``security`` lets in; follow keys' changes."""
        check_reach(serves_host(), security.is_protected, "http_options.host")
        check_reach(limits.admin_host, security.is_protected, "gateway.admin_host")
        keyring = None if security.keys_file is None else Keyring(Path(security.keys_file))
        self._certificates = certificates_in(serves_http())
        check_encryption(serves_http(), os.environ)
        narrow_serve()
        share_no_port()
        self.access = Access(keyring, metrics.refused_caller)
        if keyring is not None:
            describe_nothing()
            self._following = asyncio.create_task(keyring.follow(), name="keys")

    def _problem(self) -> str:
        """Return what is wrong with the files of keys and certificate, as they are now."""
        certificates = self._certificates
        problems = [self.access.problem, "" if certificates is None else certificates.problem]
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
        limit_s = self.service.limits.max_timeout_s + GRACE_S
        return self._room.places.taken, limit_s

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the use of this gateway to Serve, which calls this method by its name."""
        return {USE: self._room.use()}

    def __serve_build_asgi_app__(self) -> FastAPI:
        limits = self.service.limits
        browsers = BrowserRules(is_loopback(serves_host()), limits.hosts, limits.origins)
        return create_app(self.service, self.predictions, self.admin, self.access, False, browsers)


class ListeningGateway(GatewayReplica):
    """A gateway that answers operators, and gRPC's clients where Serve does not."""

    _grpc_servers: tuple[GrpcServer, ...] = ()

    async def __init__(self, *args: Any) -> None:  # type: ignore[misc]
        """Load and start as :class:`GatewayReplica`, and open the ports of its own."""
        super().__init__(*args)
        await self._deployment.take_turn(self._keys)
        limits = self.service.limits
        addresses = {
            CLIENTS: await own_grpc_address(),
            OPERATORS: await admin_address(limits.admin_host, limits.admin_port),
        }
        self._grpc_servers = tuple(
            self._server(surface, *address)
            for surface, address in addresses.items()
            if address is not None
        )
        for server in self._grpc_servers:
            server.start()

    def _server(self, surface: Surface, host: str, port: int) -> GrpcServer:
        max_message_bytes = MESSAGE_ROOM * self.service.limits.max_body_bytes
        return GrpcServer(self, surface, host, port, max_message_bytes, self._certificates)

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica, once it knows of no request."""
        stops = [server.stop(self.service.limits.max_timeout_s) for server in self._grpc_servers]
        await asyncio.gather(*stops)  # none of them waits for another to stop listening


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
            partial(metrics.router_call, model.id),
            keys_of_call if shares_prefixes and not is_mixture else no_keys,
        )
    return calls


Gateway = serve.ingress()(ListeningGateway)
"""The class that :func:`router.app.build` deploys."""
