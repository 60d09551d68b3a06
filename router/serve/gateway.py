"""The gateway as a Serve deployment class: one replica serves HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.controller.application import app_is_wanted
from cluster.reports import Samples
from cluster.spec import OnExpertLoss
from router.config import GatewayConfig
from router.gateway.grpc.handlers import GrpcHandlers
from router.gateway.grpc.service import GrpcMethods
from router.gateway.metrics import Metrics
from router.gateway.models import load_models
from router.gateway.openai.app import create_app
from router.gateway.ray_upstream import RayUpstream
from router.gateway.service import GenerationService
from router.gateway.upstream import Upstream
from router.serve.autoscaling import USE
from router.serve.process import collector_paused, setup_logging, torch_hidden
from router.served import ServedModel


class GatewayReplica(GrpcMethods):
    """One gateway process; loads the tokenizers, and knows no weights.

    Serve builds the HTTP app after the constructor (``__serve_build_asgi_app__``), so nothing of
    it is ever pickled.
    """

    def __init__(
        self,
        models: tuple[ServedModel, ...],
        limits: GatewayConfig,
        make_upstream: Callable[..., Upstream],
        *upstream_args: Any,
    ) -> None:
        """Load the tokenizers and call ``make_upstream(samples, *upstream_args)`` in the loop.

        ``samples`` returns what this gateway measures.

        The arguments are the constructor's own, so that Serve puts handles in place of bound
        deployments among them.
        """
        metrics = Metrics()
        upstream = make_upstream(metrics.samples, *upstream_args)
        with collector_paused(), torch_hidden():  # transformers is imported for its tokenizers
            loaded = load_models(models)
        self.service = GenerationService(loaded, limits, upstream, metrics)
        self.grpc_handlers = GrpcHandlers(self.service)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve how much of this gateway is used; Serve calls this by its name."""
        return {USE: self.service.use()}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service, echoes_request_id=False)


Gateway = serve.ingress()(GatewayReplica)
"""Bind it: ``serve.deployment(Gateway, …).bind(models, limits, make_upstream, *upstream_args)``."""


def make_upstream(
    samples: Callable[[], Samples],
    controller: DeploymentHandle,
    routers: Mapping[str, DeploymentHandle],
    max_calls: int,
    on_expert_loss: OnExpertLoss,
) -> RayUpstream:
    """Make a gateway replica's upstream, in the replica."""
    setup_logging()
    app = serve.get_replica_context().app_name
    is_wanted = partial(app_is_wanted, app)
    return RayUpstream(controller, routers, max_calls, on_expert_loss, is_wanted, samples)
