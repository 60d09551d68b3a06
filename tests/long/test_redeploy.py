"""A changed configuration is deployed while requests never stop coming."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray import serve

from router.app import GRACEFUL_SHUTDOWN_S, build
from tests.cluster_fixture import APP, TINY, ServedCluster, StreamReader, greedy, wait_until
from tests.fault.faults import PROMPTS
from tests.fault.nothing_lost import BACK_S, nothing_lost

LONG_PROMPTS, IN_FLIGHT, LONG = PROMPTS[:2], 40, 900
"""Streams are begun until the gateway is replaced; the newest have some hundred tokens to come."""
DRAINED_S = GRACEFUL_SHUTDOWN_S + 1.0
"""Longer than Serve waits for what ends at once."""
CHANGED: dict[str, dict[str, Any]] = {
    "experts": {"num_cpus": 0.5},  # its process's for life: every actor is replaced
    "router": {"max_queue_requests": 250},
    "gateway": {"max_ongoing_requests": 1000, "max_choices": 15},
}
"""Stays in force for the tests that follow, none of which depends on these limits."""


@pytest.mark.timeout(300)
def test_a_changed_configuration_is_deployed_without_a_loss(served: ServedCluster) -> None:
    """Streams that have begun go on at the gateway and router that have them, however long."""
    expected = served.crowd(TINY, LONG_PROMPTS, [greedy(LONG)] * len(LONG_PROMPTS))
    before = served.status()
    streams: list[StreamReader] = []

    def begin_streams() -> None:
        for _ in range(IN_FLIGHT - sum(not stream.ended for stream in streams)):
            prompt = LONG_PROMPTS[len(streams) % len(LONG_PROMPTS)]
            streams.append(StreamReader(served.client, prompt, greedy(LONG), TINY, BACK_S))

    def new_gateways() -> set[str]:
        found = set(served.status().gateways) - set(before.gateways)
        if not found:
            begin_streams()  # so that each stream begins at an old gateway
        return found

    begin_streams()
    for stream in streams:
        stream.wait_tokens(1)
    with nothing_lost(served) as answered, ThreadPoolExecutor(1) as pool:
        served.args.update({name: {**served.args[name], **new} for name, new in CHANGED.items()})
        deployed = pool.submit(serve.run, build(served.args), name=APP, route_prefix="/")
        new = wait_until(new_gateways, "another gateway", BACK_S)
        replaced_s = time.monotonic()
        for index, stream in enumerate(streams):
            assert stream.result(BACK_S) == expected[index % len(LONG_PROMPTS)]
        outlived_s = max(stream.arrived_s[-1] for stream in streams) - replaced_s
        print(f"{len(streams)} streams; the last ended {outlived_s:.1f} s after the replacement")
        assert outlived_s > DRAINED_S
        deployed.result(BACK_S)
        after = served.wait_whole(BACK_S)
        answered()
    assert set(after.gateways) == new
    assert after.epoch > before.epoch
    assert not {actor.pid for actor in before.actors} & {actor.pid for actor in after.actors}
    # Whichever of the new actors has them.
    held = [sorted(e for actor in told.actors for e in actor.experts) for told in (before, after)]
    assert held[0] == held[1]
    assert not set(before.gateways) & set(after.gateways)
    assert not set(before.routers) & set(after.routers)
