"""A changed configuration is deployed while requests never stop coming."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray import serve

from router.app import GRACEFUL_SHUTDOWN_S, build
from tests.cluster_fixture import APP, TINY, ServedCluster, StreamReader, greedy, wait_until
from tests.fault.faults import PROMPTS
from tests.fault.nothing_lost import BACK_S, nothing_lost

LONG_PROMPTS, LONG_TIMES, LONG = PROMPTS[:2], 5, 900
"""Ten streams of 900 tokens take longer than a redeploy."""
DRAINED_S = GRACEFUL_SHUTDOWN_S + 1.0
"""Longer than Serve waits for what ends at once."""
CHANGED = {
    "experts": {"max_queue_rows": 60_000},  # another specification: every actor is replaced
    "router": {"max_queue_requests": 250},
    "gateway": {"max_ongoing_requests": 1000, "max_choices": 15},
}
"""Stays in force for the tests that follow, none of which depends on these limits."""


@pytest.mark.timeout(300)
def test_a_changed_configuration_is_deployed_without_a_loss(served: ServedCluster) -> None:
    """Streams that have begun go on at the gateway and router that have them, however long."""
    expected = served.crowd(TINY, LONG_PROMPTS, [greedy(LONG)] * len(LONG_PROMPTS))
    before = served.status()
    prompts = LONG_PROMPTS * LONG_TIMES
    streams = [StreamReader(served.client, p, greedy(LONG), TINY, BACK_S) for p in prompts]
    for stream in streams:
        stream.wait_tokens(1)
    with nothing_lost(served) as answered, ThreadPoolExecutor(1) as pool:
        served.args.update({name: {**served.args[name], **new} for name, new in CHANGED.items()})
        deployed = pool.submit(serve.run, build(served.args), name=APP, route_prefix="/")
        new = wait_until(
            lambda: set(served.status().gateways) - set(before.gateways), "another gateway", BACK_S
        )
        replaced_s = time.monotonic()
        assert [stream.result(BACK_S) for stream in streams] == expected * LONG_TIMES
        outlived_s = max(stream.arrived_s[-1] for stream in streams) - replaced_s
        print(f"streams went on for {outlived_s:.1f} s after their gateway was replaced")
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
