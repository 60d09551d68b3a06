"""The gateway dies with streams under way: our client goes on where each of them was."""

from __future__ import annotations

import pytest

from router.client import Client
from tests.cluster_fixture import RANDOM, ServedCluster, StreamReader, greedy
from tests.fault import faults
from tests.fault.faults import BEFORE, LENGTH, kill

PROMPTS = faults.PROMPTS[:4]
BACK_S = 90.0


def expected_tokens(served: ServedCluster) -> list[tuple[int, ...]]:
    """Return what transformers makes of :data:`PROMPTS`."""
    return [served.expected(prompt, LENGTH) for prompt in PROMPTS]


def start_own_streams(client: Client) -> list[StreamReader]:
    """Return greedy streams of a client that goes on; they have begun."""
    streams = [StreamReader(client, p, greedy(LENGTH), RANDOM, BACK_S) for p in PROMPTS]
    for stream in streams:
        stream.wait_tokens(BEFORE)
    return streams


@pytest.mark.timeout(300)
def test_our_client_goes_on_when_the_gateway_is_killed(served: ServedCluster) -> None:
    expected, told = expected_tokens(served), served.status()
    with Client(served.grpc_address) as client:
        streams = start_own_streams(client)
        kill(told, *(gateway.pid for gateway in told.gateways))
        assert not any(stream.ended for stream in streams)
        assert [stream.result(BACK_S) for stream in streams] == expected
    after = served.wait_whole()
    assert not {one.pid for one in after.gateways} & {one.pid for one in told.gateways}
    assert after.routers == told.routers
