"""Emulated devices that write down what they did, by subclasses: the product has no hook.

Actors import this, so it is without Serve, as the product's actors are: that takes them a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from cluster.spec import ACTOR_NAMESPACE, ExpertKey, parse_actor_name
from experts.remote import RemoteExpertActor

if TYPE_CHECKING:
    import numpy as np

    from experts.actor import ExpertActor

TIMEOUT_S = 30.0


class Product(NamedTuple):
    """One expert's product, and when it began (``time.perf_counter``)."""

    layer_id: int
    expert_id: int
    start_s: float


def _recording_actor(recorded: list[Product], *arguments: Any) -> ExpertActor:
    from experts.actor import ExpertActor
    from experts.bank import Expert

    class RecordingExpert:
        """An expert around another one."""

        def __init__(self, inner: Expert, key: ExpertKey) -> None:
            self._inner = inner
            self._key = key
            self.num_bytes, self.row_shape = inner.num_bytes, inner.row_shape
            self.kernel_class = inner.kernel_class
            self.takes = inner.takes
            self.dtype = inner.dtype
            self.grouped = None  # each product is recorded

        def __call__(self, rows: np.ndarray) -> np.ndarray:
            key = self._key
            recorded.append(Product(key.layer_id, key.expert_id, time.perf_counter()))
            return self._inner(rows)

    class RecordingActor(ExpertActor):
        def _load_expert(self, checkpoint: Any, key: ExpertKey) -> Expert:
            return RecordingExpert(super()._load_expert(checkpoint, key), key)

    return RecordingActor(*arguments)


class RecordingRemoteActor(RemoteExpertActor):
    """The expert actor as Ray sees it, recording."""

    def __init__(self, *arguments: Any) -> None:
        """As :class:`RemoteExpertActor`."""
        self._recorded: list[Product] = []
        self._actor = _recording_actor(self._recorded, *arguments)

    @ray.method(concurrency_group="control")
    def recorded(self) -> list[Product]:
        """Return all products since the actor's start."""
        return list(self._recorded)


def recorded(app: str) -> dict[str, list[Product]]:
    """Return what each actor of an application has done, by its id."""
    products = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        parsed = parse_actor_name(entry["name"], app)
        if parsed is not None:
            handle = ray.get_actor(entry["name"], namespace=ACTOR_NAMESPACE)
            products[parsed[0]] = ray.get(handle.recorded.remote(), timeout=TIMEOUT_S)
    return products
