"""The expert actor as Ray sees it; only the actor's own process imports what computes experts.

The controller needs this class to create actors, and nothing of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ray

from cluster.spec import ActorReport, ActorSpec, ExpertKey
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.wire.checksum import sealed, unsealed
from cluster.wire.frames import Buffer, ErrorFrame, encode


class RemoteExpertActor:
    """An :class:`experts.actor.ExpertActor` whose calls run on Ray's threads.

    Control calls have a concurrency group of their own, so that a slow batch does not delay them.
    """

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        """See :class:`ExpertActor`."""
        from experts.actor import ExpertActor

        self._actor = ExpertActor(spec, actor_id, generation, epoch)

    @ray.method(concurrency_group="control")
    def load(self, epoch: int, spec: ActorSpec, keys: Sequence[ExpertKey]) -> ActorReport:
        """See :meth:`ExpertActor.load`."""
        return self._actor.load(epoch, spec, keys)

    @ray.method(concurrency_group="control")
    def unload(self, epoch: int, keys: Sequence[ExpertKey]) -> ActorReport:
        """See :meth:`ExpertActor.unload`."""
        return self._actor.unload(epoch, keys)

    @ray.method(concurrency_group="control")
    def heartbeat(self, epoch: int) -> ActorReport:
        """See :meth:`ExpertActor.heartbeat`."""
        return self._actor.heartbeat(epoch)

    @ray.method(concurrency_group="control")
    def describe(self, epoch: int = 0) -> ActorReport:
        """See :meth:`ExpertActor.describe`."""
        return self._actor.describe(epoch)

    @ray.method(concurrency_group="control")
    def offer_stream(self, network: Network) -> StreamOffer:
        """See :meth:`ExpertActor.offer_stream`."""
        return self._actor.offer_stream(network)

    def compute(self, data: bytes) -> bytes:
        """See :meth:`ExpertActor.compute`; frame and answer have checksums, as Ray has none."""
        return sealed_answer(self._actor.compute, data)


def sealed_answer(compute: Callable[[Buffer], bytes], data: bytes) -> bytes:
    """Return the answer to a frame with a checksum, with one too; an error to a damaged frame."""
    frame = unsealed(data)
    if frame is None:
        return b"".join(sealed(encode(ErrorFrame.of_damage())))
    return b"".join(sealed((compute(frame),)))
