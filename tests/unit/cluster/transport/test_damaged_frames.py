"""Answers that come late, damaged or not at all, by a wire to the experts: same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.transport.stream.server import Answer, StreamServer
from cluster.wire.frames import Buffer, DispatchFrame, Parts, encode
from experts.actor import _read
from experts.bank import ExpertBank
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.cluster_fixture import prompt_of, wait_until
from tests.fault.wire import Wire
from tests.local_cluster import MODEL, LocalCluster, greedy_request

LENGTH, LIMIT_S = 6, 20.0
NUMBERS = itertools.count()


class Wired:
    """An engine whose frames go to expert banks by streams over a wire, else straight to them."""

    def __init__(self, folder: Path) -> None:
        self.plain = LocalCluster(folder)
        self.servers = {
            actor_id: StreamServer(_answers(bank), "127.0.0.1", None)
            for actor_id, bank in self.plain.transport.banks.items()
        }
        self.wire = Wire()
        connector = Connector(self.wire.between(self._offer), None)
        self.transport = StreamTransport(connector, self.plain.transport)
        self.cluster = LocalCluster(folder, elsewhere=(MODEL, self.transport, self.plain.placement))
        self.retries = self.cluster.dispatcher.retries

    def _offer(
        self, actor_id: str, generation: int, network: Network, timeout_s: float
    ) -> StreamOffer:
        return self.servers[actor_id].offer(network)

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
    def answer(frame: Buffer) -> Parts:
        read = _read(frame)
        return encode(bank.compute([read])[0]) if isinstance(read, DispatchFrame) else read

    return lambda frames: list(map(answer, frames))


def tokens_of(cluster: LocalCluster) -> tuple[int, ...]:
    """Generate once with an engine."""
    request = greedy_request(f"r{next(NUMBERS)}", prompt_of(9, 77, VOCAB_SIZE), LENGTH)
    [[event]] = cluster.generate(request)
    return event.token_ids


@pytest.fixture
def wired(tmp_path: Path) -> Iterator[Wired]:
    save_mixtral(tmp_path)
    wired = Wired(tmp_path)

    def streams() -> bool:
        before = wired.elsewhere()
        wired.tokens()
        return wired.elsewhere() == before

    try:
        wait_until(streams, "everything goes over the wire", LIMIT_S)
        yield wired
    finally:
        wired.close()


def test_late_answers_are_waited_for(wired: Wired) -> None:
    before = wired.elsewhere()
    wired.wire.fault("delayed", 3)
    tokens = wired.tokens()
    assert wired.wire.hits == {"delayed": 3}
    assert wired.elsewhere() == before
    assert not wired.retries
    assert tokens == tokens_of(wired.plain)
    assert not wired.cluster.suspected


def test_damaged_answers_are_asked_for_again(wired: Wired) -> None:
    expected, before = tokens_of(wired.plain), wired.elsewhere()
    wired.wire.fault("corrupted", 5)

    def all_hit() -> bool:
        assert wired.tokens() == expected
        return wired.wire.hits["corrupted"] == 5

    wait_until(all_hit, "every fault hits", LIMIT_S)
    assert wired.retries == {"malformed": 5}
    # What damages an answer is not used again: until there is another, calls go elsewhere.
    assert wired.elsewhere() > before
    assert not wired.cluster.suspected


def test_damaged_frames_are_sent_again(wired: Wired) -> None:
    wired.wire.fault("garbled", 2)
    assert wired.tokens() == tokens_of(wired.plain)
    assert wired.wire.hits == {"garbled": 2}
    assert wired.retries == {"malformed": 2}
    assert not wired.cluster.suspected


def test_calls_go_elsewhere_when_their_connection_is_cut(wired: Wired) -> None:
    before = wired.elsewhere()
    wired.wire.fault("cut", 2)
    tokens = wired.tokens()
    assert wired.elsewhere() >= before + 2
    assert wired.wire.hits == {"cut": 2}
    assert not wired.cluster.suspected
    assert tokens == tokens_of(wired.plain)
