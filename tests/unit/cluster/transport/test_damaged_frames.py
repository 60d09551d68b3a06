"""Answers that come late, damaged or not at all, by a wire to the experts: same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.transport.stream import link
from cluster.transport.stream.handshake import Network
from tests.checkpoints import save_mixtral
from tests.cluster_fixture import wait_until
from tests.fault.wire import Fault
from tests.unit.cluster.transport.wired import Wired, tokens_of

LIMIT_S = 60.0


@pytest.fixture
def wired(tmp_path: Path) -> Iterator[Wired]:
    save_mixtral(tmp_path)
    wired = Wired(tmp_path)
    yield wired
    wired.close()


@pytest.fixture
def between_hosts(tmp_path: Path) -> Iterator[Wired]:
    save_mixtral(tmp_path)
    wired = Wired(tmp_path, network=Network.TCP)
    yield wired
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


@pytest.mark.parametrize("fault", ["flipped", "shortened"])
def test_an_answer_with_one_bit_flipped_or_cut_short_between_hosts_is_asked_for_again(
    between_hosts: Wired, fault: Fault
) -> None:
    wired, count = between_hosts, 8
    expected = tokens_of(wired.plain)
    wired.wire.fault(fault, count)

    def all_hit() -> bool:
        assert wired.tokens() == expected
        return wired.wire.hits[fault] == count

    wait_until(all_hit, "every fault hits", LIMIT_S)
    assert wired.retries["damaged"] == count


def test_a_frame_with_one_bit_flipped_between_hosts_is_sent_again(between_hosts: Wired) -> None:
    wired, count = between_hosts, 8
    expected = tokens_of(wired.plain)
    wired.wire.fault("flipped_frame", count)

    def all_hit() -> bool:
        assert wired.tokens() == expected
        return wired.wire.hits["flipped_frame"] == count

    wait_until(all_hit, "every fault hits", LIMIT_S)


@pytest.mark.parametrize("fault", ["longer", "longer_frame"])
def test_a_connection_whose_message_claims_too_many_bytes_is_replaced(
    between_hosts: Wired, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """All that follows would count as a part of the message, and every call would time out."""
    wired = between_hosts
    monkeypatch.setattr(link, "SILENT_S", 0.3)
    wired.cluster.dispatcher._call_timeout_s = 0.5
    expected = tokens_of(wired.plain)
    wired.wire.fault(fault, 1)
    assert wired.tokens() == expected
    assert wired.wire.hits == {fault: 1}
    wait_until(wired._streams, "everything goes over the wire again", LIMIT_S)
    assert wired.retries == {"timed_out": 1}
