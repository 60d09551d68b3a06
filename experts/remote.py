"""The expert actor as Ray sees it; torch is imported in the actor's own process only.

Whoever creates actors needs their class, and the controller creates them: so it is without torch,
which is most of its memory and half of what a new controller takes to start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from cluster.spec import ActorReport, ActorSpec, ExpertKey
from cluster.transport.stream.handshake import Network, StreamOffer

if TYPE_CHECKING:
    from experts.actor import ExpertActor


class RemoteExpertActor:
    """An :class:`experts.actor.ExpertActor`, with Ray's threads for its calls.

    Control calls have a concurrency group of their own, so that slow products do not delay them.
    """

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        """See :class:`ExpertActor`."""
        from experts.actor import ExpertActor

        self._actor: ExpertActor = ExpertActor(spec, actor_id, generation, epoch)

    @ray.method(concurrency_group="control")
    def load(self, epoch: int, keys: Sequence[ExpertKey]) -> ActorReport:
        """See :meth:`ExpertActor.load`."""
        return self._actor.load(epoch, keys)

    @ray.method(concurrency_group="control")
    def unload(self, epoch: int, keys: Sequence[ExpertKey]) -> ActorReport:
        """See :meth:`ExpertActor.unload`."""
        return self._actor.unload(epoch, keys)

    @ray.method(concurrency_group="control")
    def heartbeat(self, epoch: int) -> ActorReport:
        """See :meth:`ExpertActor.heartbeat`."""
        return self._actor.heartbeat(epoch)

    @ray.method(concurrency_group="control")
    def describe(self) -> ActorReport:
        """See :meth:`ExpertActor.describe`."""
        return self._actor.describe()

    @ray.method(concurrency_group="control")
    def offer_stream(self, network: Network) -> StreamOffer:
        """See :meth:`ExpertActor.offer_stream`."""
        return self._actor.offer_stream(network)

    def compute(self, data: bytes) -> bytes:
        """See :meth:`ExpertActor.compute`."""
        return self._actor.compute(data)
