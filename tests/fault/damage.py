"""Expert actors whose answers come damaged now and then, of a deployment as any other.

Used by the tests and by ``benchmarks.soak``, so nothing here knows of pytest.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import ray

from cluster.spec import ActorSpec
from cluster.transport.stream import channel
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.wire.checksum import sealed
from cluster.wire.frames import Buffer, Buffers, RowsFrame, decode, encode, joined
from experts.remote import RemoteExpertActor
from router.serve.controller import ControllerDeployment

EVERY = 100
"""One in so many answers comes damaged."""


def not_finite(frame: bytes, value: float) -> Buffers:
    """Return an answer whose last value of four bytes is replaced; of two bytes, its last two."""
    answer = decode(frame)
    if not isinstance(answer, RowsFrame):
        return (frame,)
    rows = bytearray(joined(answer.rows))
    end = struct.pack("<f", value)
    width = 4 if answer.dtype == "float32" else 2
    rows[-width:] = end[-width:]  # the upper half of a float32 is the bfloat16
    return encode(answer._replace(rows=(bytes(rows),)))


DAMAGES: Sequence[Callable[[bytes], Buffers]] = (
    lambda frame: not_finite(frame, float("nan")),
    lambda frame: not_finite(frame, float("inf")),
    lambda frame: (frame[: len(frame) // 2],),
)


class DamagingActor(RemoteExpertActor):
    """An actor that damages answers by turns: NaN, infinity, cut short, one bit flipped.

    It looks as if it were on another host, so that frames have checksums.
    """

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        """See :class:`RemoteExpertActor`."""
        super().__init__(spec, actor_id, generation, epoch)
        self._numbers = itertools.count(1)
        self._sent = itertools.count(1)
        compute = self._actor.compute_all

        def damaged(data: Sequence[Buffer]) -> Iterator[Buffers]:
            return map(self._damaged, compute(data))

        self._actor._streams._answer = damaged
        channel.sealed = self._sealed  # type: ignore[attr-defined]

    def _damaged(self, buffers: Buffers) -> Buffers:
        number = next(self._numbers)
        if number % EVERY:
            return buffers
        return DAMAGES[number // EVERY % len(DAMAGES)](b"".join(buffers))

    def _sealed(self, buffers: Buffers) -> Buffers:
        whole = sealed(buffers)
        number = next(self._sent)
        if number % (4 * EVERY) or not buffers:
            return whole
        data = bytearray(b"".join(whole))
        data[number % len(data)] ^= 1 << number % 8
        return (bytes(data),)

    @ray.method(concurrency_group="control")
    def offer_stream(self, network: Network) -> StreamOffer:
        """See :meth:`RemoteExpertActor.offer_stream`."""
        offer = super().offer_stream(Network.TCP)
        if network is Network.UNIX:
            return StreamOffer(network, b"\0no-such-name", offer.key_id, offer.secret)
        return offer


class DamagingController(ControllerDeployment):
    """A controller of such actors."""

    actor_class: ClassVar[type] = DamagingActor
