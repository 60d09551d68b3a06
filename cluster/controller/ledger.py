"""The ledger: what must never go backwards, even when the controller and all actors die together.

Routers take only a newer placement, and an actor's name contains its generation. A new controller
learns both from the living actors, and where none survived from this ledger. It lies in Ray's
key-value store, which lives as long as the cluster's head.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)

from cluster.controller.fleet import PoolMembers
from cluster.spec import ModelExperts

KV_NAMESPACE = b"expertmesh"


@dataclass(frozen=True, slots=True)
class Ledger:
    """The last epoch of an application's controllers, and the last generation of each actor.

    ``pools`` has the members of each pool, which scaling changes. ``models`` are those that actors
    may hold experts of.
    """

    epoch: int = 0
    generations: dict[str, int] = field(default_factory=dict)
    pools: dict[str, PoolMembers] = field(default_factory=dict)
    models: tuple[ModelExperts, ...] = ()

    def to_json(self) -> str:
        """Return the ledger as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Ledger:
        """Rebuild a ledger from :meth:`to_json`."""
        fields = json.loads(text)
        pools = {
            name: PoolMembers(
                pool["configured"], tuple(pool["actors"]), tuple(pool.get("standby", ()))
            )
            for name, pool in fields.pop("pools", {}).items()
        }
        models = tuple(
            ModelExperts(**{**model, "layers": tuple(model["layers"])})
            for model in fields.pop("models", ())
        )
        return cls(**fields, pools=pools, models=models)


class LedgerStore:
    """The ledger of one application; every call is one short round trip to Ray's head."""

    def __init__(self, app: str) -> None:
        """Works in a process that is connected to Ray."""
        self._key = app.encode()

    def read(self) -> Ledger:
        """Return the ledger written last, or an empty one."""
        data = _internal_kv_get(self._key, namespace=KV_NAMESPACE)
        return Ledger.from_json(data) if data else Ledger()

    def write(self, ledger: Ledger) -> None:
        """Replace the ledger."""
        data = ledger.to_json().encode()
        _internal_kv_put(self._key, data, overwrite=True, namespace=KV_NAMESPACE)

    def clear(self) -> None:
        """Delete the ledger, with its application."""
        _internal_kv_del(self._key, namespace=KV_NAMESPACE)
