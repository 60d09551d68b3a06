"""An engine over expert banks that are reached by streams, in one process."""

from __future__ import annotations

import itertools
from pathlib import Path

from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.transport.stream.server import Answer, StreamServer
from cluster.wire.frames import Buffer, Buffers, DispatchFrame, encode
from experts.bank import ExpertBank
from experts.queue import _read
from tests.checkpoints import VOCAB_SIZE
from tests.cluster_fixture import prompt_of, wait_until
from tests.fault.wire import Wire
from tests.local_cluster import MODEL, LocalCluster, greedy_request

LENGTH, LIMIT_S = 6, 60.0
NUMBERS = itertools.count()


class Wired:
    """An engine whose frames go to expert banks by streams over a wire, else straight to them."""

    def __init__(
        self, folder: Path, dtype: str | None = None, network: Network = Network.UNIX
    ) -> None:
        """Connect; returns once all frames go over the wire."""
        self.plain = LocalCluster(folder, dtype=dtype)
        self.servers = {
            actor_id: StreamServer(_answers(bank), "127.0.0.1", None)
            for actor_id, bank in self.plain.transport.banks.items()
        }
        self.wire = Wire(network)
        connector = Connector(self.wire.between(self._offer), None)
        self.transport = StreamTransport(connector, self.plain.transport)
        where = (MODEL, self.transport, self.plain.placement)
        self.cluster = LocalCluster(folder, dtype=dtype, elsewhere=where)
        self.retries = self.cluster.dispatcher.retries
        wait_until(self._streams, "everything goes over the wire", LIMIT_S)

    def _offer(
        self, actor_id: str, generation: int, network: Network, timeout_s: float
    ) -> StreamOffer:
        return self.servers[actor_id].offer(network)

    def _streams(self) -> bool:
        before = self.elsewhere()
        self.tokens()
        return self.elsewhere() == before

    def elsewhere(self) -> int:
        """Return how many frames went straight to the banks so far."""
        return len(self.plain.transport.frames)

    def tokens(self) -> tuple[int, ...]:
        """Generate once by the wire."""
        return tokens_of(self.cluster)

    def close(self) -> None:
        """End all of it."""
        self.cluster.close()
        self.plain.close()
        self.transport.close()
        self.wire.close()
        for server in self.servers.values():
            server.close()


def _answers(bank: ExpertBank) -> Answer:
    def answer(frame: Buffer) -> Buffers:
        read = _read(frame)
        return encode(bank.compute([read])[0]) if isinstance(read, DispatchFrame) else read.answer

    return lambda frames: list(map(answer, frames))


def tokens_of(cluster: LocalCluster) -> tuple[int, ...]:
    """Generate once with an engine."""
    request = greedy_request(f"r{next(NUMBERS)}", prompt_of(9, 77, VOCAB_SIZE), LENGTH)
    [[event]] = cluster.generate(request)
    return event.token_ids
