"""The private names of Ray that the product uses, all three of them.

| Name | What for | What takes its place where Ray no longer has it |
|---|---|---|
| ``ray._private.state.state`` | nodes' free resources, nodes that drain | all resources; none |
| ``ray.experimental.internal_kv`` | the ledger, last words | an actor, which dies with its node |
| ``ray.serve.context._get_global_client`` | one application's status, Serve's tracing | \
``serve.status()``, which costs Serve more; expert actors without spans |

Serve is imported where it is asked: expert actors take their store from here, and would be half as
large again with it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import ray

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatus, DeploymentStatus, TracingConfig

TIMEOUT_S = 30.0
NAMESPACE = "expertmesh"
"""Of our keys in Ray's store, and of the actor that takes its place."""

logger = logging.getLogger("expertmesh.cluster")


def _private(module: str, name: str) -> Any:
    """Return a private name of Ray, or ``None`` if it is gone."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        _tell(f"{module}.{name}")
        return None


@functools.cache
def _tell(name: str) -> None:
    logger.warning("this Ray has no %s: using a public API instead, which knows less", name)


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Return the resources of each node, by its id, that nothing uses."""
    available = _private("ray._private.state", "available_resources_per_node")
    if available is None:
        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    free: Mapping[str, Mapping[str, float]] = available()
    return free


def draining_nodes() -> set[str]:
    """Return the nodes that Ray is about to take away: scaled down, or with a spot notice."""
    state = _private("ray._private.state", "state")
    return set() if state is None else set(state.get_draining_nodes())


@dataclass(frozen=True, slots=True)
class DeploymentState:
    """What Serve says of a deployment."""

    status: DeploymentStatus
    message: str = ""


@dataclass(frozen=True, slots=True)
class AppStatus:
    """What Serve says of an application, and of its deployments by name."""

    status: ApplicationStatus
    message: str
    deployments: Mapping[str, DeploymentState]


def app_status(app: str) -> AppStatus | None:
    """Ask Serve for one application; ``None`` if no Serve runs, or none that has it.

    Raises Ray's error if Serve does not answer.
    """
    get_client = _private("ray.serve.context", "_get_global_client")
    if get_client is None:
        from ray import serve

        found = serve.status().applications.get(app)
        if found is None:
            return None
        return AppStatus(found.status, found.message, _states(found.deployments))
    client = get_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    # serve.status() would collect every replica of every application, and pickle classes for it.
    # Serve's controller and ours together would spend a twentieth of a core on it.
    told = client.get_serve_status(app)
    states = _states({one.name: one for one in told.deployment_statuses})
    return AppStatus(told.app_status.status, told.app_status.message, states)


def _states(told: Mapping[str, Any]) -> dict[str, DeploymentState]:
    return {name: DeploymentState(one.status, one.message) for name, one in told.items()}


def tracing_config() -> TracingConfig | None:
    """Return Serve's own configuration of tracing; ``None`` if it goes by its variables."""
    get_client = _private("ray.serve.context", "_get_global_client")
    if get_client is None:
        return None
    controller = get_client()._controller
    config: TracingConfig | None = ray.get(
        controller.get_tracing_config.remote(), timeout=TIMEOUT_S
    )
    return config


class KeyValueStore(Protocol):
    """A store whose every call is one step; Ray's is :func:`ray_store`."""

    def create(self, key: str, value: bytes) -> bool:
        """Store a value under a new key; returns false if there is one, which stays."""
        ...

    def get(self, key: str) -> bytes | None:
        """Return the value of a key."""
        ...

    def keys(self, prefix: str) -> Sequence[str]:
        """Return all keys with this prefix."""
        ...

    def delete(self, key: str) -> None:
        """Delete a key, if it is there."""
        ...


def ray_store() -> KeyValueStore:
    """Return Ray's key-value store, in a process that is connected to Ray.

    Every call is one short round trip to Ray's head.
    """
    module = "ray.experimental.internal_kv"
    if _private(module, "_internal_kv_put") is None:
        actor = ray.remote(MemoryStore).options(
            name=NAMESPACE,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
        )
        return _ActorStore(actor.remote())
    return _RayStore(import_module(module))


class _RayStore:
    """Ray's own store."""

    def __init__(self, calls: Any) -> None:
        self._calls = calls
        self._options = {"namespace": NAMESPACE.encode()}

    def create(self, key: str, value: bytes) -> bool:
        return not self._calls._internal_kv_put(key, value, overwrite=False, **self._options)

    def get(self, key: str) -> bytes | None:
        value: bytes | None = self._calls._internal_kv_get(key, **self._options)
        return value

    def keys(self, prefix: str) -> Sequence[str]:
        return [key.decode() for key in self._calls._internal_kv_list(prefix, **self._options)]

    def delete(self, key: str) -> None:
        self._calls._internal_kv_del(key, **self._options)


class MemoryStore:
    """A store in this process's memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def create(self, key: str, value: bytes) -> bool:
        """See :class:`KeyValueStore`."""
        return self.values.setdefault(key, value) is value

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`."""
        return self.values.get(key)

    def keys(self, prefix: str) -> Sequence[str]:
        """See :class:`KeyValueStore`."""
        return [key for key in self.values if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`."""
        self.values.pop(key, None)


class _ActorStore:
    """A :class:`MemoryStore` in an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def create(self, key: str, value: bytes) -> bool:
        return bool(self._ask("create", key, value))

    def get(self, key: str) -> bytes | None:
        value: bytes | None = self._ask("get", key)
        return value

    def keys(self, prefix: str) -> Sequence[str]:
        return list(self._ask("keys", prefix))

    def delete(self, key: str) -> None:
        self._ask("delete", key)

    def _ask(self, call: str, *arguments: object) -> Any:
        return ray.get(getattr(self._actor, call).remote(*arguments), timeout=TIMEOUT_S)
