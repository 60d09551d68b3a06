"""Routers as Serve deployments: of a language model, and of a mixture.

This module imports neither torch nor transformers: the builder of the application imports it too,
and a start would wait for them twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray import serve

from router.config import AppConfig
from router.control.client import HandleController
from router.serve.autoscaling import USE
from router.serve.process import collector_paused, failures_logged, setup_logging
from router.served import ServedMixture, ServedModel

if TYPE_CHECKING:
    from router.engine.replica import RouterReplica
    from router.messages.link import LinkAddress
    from router.mixture.replica import MixtureReplica

R = TypeVar("R", "RouterReplica", "MixtureReplica")


class _Deployment(Generic[R]):
    """The part of a replica that Serve asks for, whatever it serves."""

    _replica: R | None = None

    async def stats(self) -> dict[str, Any]:
        """See :meth:`router.engine.replica.RouterReplica.stats`."""
        return await self._started().stats()

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
        setup_logging()
        app = serve.get_replica_context().app_name
        with failures_logged(f"the router of {model.id}"):
            with collector_paused():
                from router.engine.replica import RouterReplica
            client = HandleController(controller)
            self._replica = RouterReplica(app, model, config.router, config.experts, client)
        await self._replica.take_turn()

    def __del__(self) -> None:
        """Serve calls this at a graceful end of the replica."""
        if self._replica is not None:
            self._replica.close()

    async def generate(self, wire: dict[str, Any], address: LinkAddress) -> dict[str, Any]:
        """See :meth:`RouterReplica.generate`."""
        return await self._started().generate(wire, address)


class MixtureDeployment(_Deployment["MixtureReplica"]):
    """A :class:`MixtureReplica` as a Serve replica."""

    async def __init__(  # type: ignore[misc]
        self, model: ServedMixture, config: AppConfig, controller: Any
    ) -> None:
        """Load the mixture's gates and start the engine."""
        setup_logging()
        app = serve.get_replica_context().app_name
        with failures_logged(f"the router of {model.id}"):
            with collector_paused():
                from router.mixture.replica import MixtureReplica
            client = HandleController(controller)
            self._replica = MixtureReplica(app, model, config.router, config.experts, client)
        await self._replica.take_turn()

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica, once it knows of no request."""
        if self._replica is not None:
            await self._replica.finish()
            self._replica.close()

    async def predict(self, wire: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`MixtureReplica.predict`."""
        return await self._started().predict(wire)

    async def link(self) -> LinkAddress | None:
        """See :meth:`MixtureReplica.link`."""
        return await self._started().link()
