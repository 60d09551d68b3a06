"""Routers as Serve deployments: of a language model, and of a mixture.

This module imports neither torch nor transformers: the builder of the application imports it too,
and a start would wait for them twice.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray import serve

from router.config.deployment import AppConfig
from router.control.client import ControllerClient
from router.serve.autoscaling import USE
from router.serve.process import collector_paused, failures_logged, setup_logging
from router.served import Served, ServedMixture, ServedModel

if TYPE_CHECKING:
    from router.engine.replica import RouterReplica
    from router.messages.link import LinkAddress
    from router.mixture.replica import MixtureReplica

R = TypeVar("R", "RouterReplica", "MixtureReplica")
TURN_CHECK_S = 0.1

logger = logging.getLogger("expertmesh.router")


class _Deployment(Generic[R]):
    """The part of a replica that Serve asks for, whatever it serves."""

    _replica: R | None = None

    async def _start(
        self,
        model: Served,
        config: AppConfig,
        controller: Any,
        replica_class: Callable[[], Callable[..., R]],
    ) -> None:
        """Make a replica, and return once it is to serve; ``replica_class`` imports its class."""
        setup_logging()
        app, experts = serve.get_replica_context().app_name, config.experts
        with failures_logged(f"the router of {model.id}"):
            with collector_paused():
                make = replica_class()
            client = ControllerClient(controller)
            replica = self._replica = make(app, model, config.router, experts, client)
        gc.collect()
        gc.freeze()  # the model lives as long as the process; collections skip it from here on
        if experts.emulated_pools:
            logger.warning(
                "%s: the devices of some pools are emulated (%s): their experts answer zeros, and "
                "no reply is exact",
                model.id,
                ", ".join(experts.emulated_pools),
            )
        while not replica.is_its_turn():
            await asyncio.sleep(TURN_CHECK_S)

    async def stats(self) -> dict[str, Any]:
        """See :meth:`router.engine.replica.RouterReplica.stats`."""
        return await self._started().stats()

    async def link(self, model: str, node: str) -> LinkAddress | None:
        """Return where a model's gateways of a node can connect, to call this without Serve."""
        return await self._started().link(model, node)

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica, once it knows of no request."""
        if self._replica is not None:
            await self._replica.finish()
            self._replica.close()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the share of this replica that is in use; Serve calls this by its name."""
        return {USE: self._started().use()}

    def check_health(self) -> None:
        """Raise when a thread of the engine has ended; Serve then replaces the replica."""
        if not self._started().is_alive():
            raise RuntimeError("a thread of the engine has ended")

    def _started(self) -> R:
        if self._replica is None:
            raise RuntimeError("the router has not started")
        return self._replica


class RouterDeployment(_Deployment["RouterReplica"]):
    """A :class:`RouterReplica` as a Serve replica."""

    async def __init__(  # type: ignore[misc]
        self, model: ServedModel, config: AppConfig, controller: Any
    ) -> None:
        """Load the model's dense part and start the engine."""
        await self._start(model, config, controller, _router_replica)

    async def generate(self, wire: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`RouterReplica.generate`."""
        return await self._started().generate(wire)


class MixtureDeployment(_Deployment["MixtureReplica"]):
    """A :class:`MixtureReplica` as a Serve replica."""

    async def __init__(  # type: ignore[misc]
        self, model: ServedMixture, config: AppConfig, controller: Any
    ) -> None:
        """Load the mixture's gates and start the engine."""
        await self._start(model, config, controller, _mixture_replica)

    async def predict(self, wire: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`MixtureReplica.predict`."""
        return await self._started().predict(wire)


def _router_replica() -> Callable[..., RouterReplica]:
    from experts.checkpoint.remote.remote_reader import RayNeighbours
    from router.engine.replica import RouterReplica
    from router.gateway.input.tokenizer import load_tokenizer

    return partial(
        RouterReplica,
        vocabulary_of=lambda model: load_tokenizer(model, RayNeighbours()).vocabulary(
            model.vocab_size, model.eos_token_ids
        ),
    )


def _mixture_replica() -> type[MixtureReplica]:
    from router.mixture.replica import MixtureReplica

    return MixtureReplica
