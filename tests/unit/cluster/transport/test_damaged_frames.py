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


@pytest.mark.parametrize(
    ("fault", "count", "retries", "elsewhere"),
    [
        ("delayed", 3, {}, 0),  # they are waited for
        ("garbled", 2, {"malformed": 2}, 0),
        ("cut", 2, {}, 2),
    ],
)
def test_calls_are_sent_again_or_elsewhere(
    wired: Wired, fault: Fault, count: int, retries: dict[str, int], elsewhere: int
) -> None:
    before = wired.elsewhere()
    wired.wire.fault(fault, count)
    tokens = wired.tokens()
    assert wired.wire.hits == {fault: count}
    assert wired.elsewhere() >= before + elsewhere
    assert fault != "delayed" or wired.elsewhere() == before
    assert fault == "cut" or wired.retries == retries
    assert not wired.cluster.suspected
    assert tokens == tokens_of(wired.plain)


def all_hit(wired: Wired, fault: Fault, count: int) -> None:
    """Have faults hit, as many as a count, while all tokens are right."""
    expected = tokens_of(wired.plain)
    wired.wire.fault(fault, count)

    def are_all() -> bool:
        assert wired.tokens() == expected
        return wired.wire.hits[fault] == count

    wait_until(are_all, "every fault hits", LIMIT_S)
    assert not wired.cluster.suspected


def test_damaged_answers_are_asked_for_again(wired: Wired) -> None:
    before = wired.elsewhere()
    all_hit(wired, "corrupted", 5)
    assert wired.retries == {"malformed": 5}
    # What damages an answer is not used again: until there is another, calls go elsewhere.
    assert wired.elsewhere() > before


@pytest.mark.parametrize("fault", ["flipped", "shortened", "flipped_frame"])
def test_what_is_damaged_between_hosts_is_sent_again(between_hosts: Wired, fault: Fault) -> None:
    all_hit(between_hosts, fault, 8)
    if fault != "flipped_frame":
        assert between_hosts.retries["damaged"] == 8


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
