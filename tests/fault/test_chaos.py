"""Random faults on all parts and a changed configuration, while requests never stop coming.

No request fails, and no token is lost, doubled or wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from ray import serve

from router.app import build
from tests.cluster_fixture import APP, RANDOM, ServedCluster, wait_until
from tests.fault.faults import PROMPTS
from tests.fault.injector import inject
from tests.fault.load import Case, Load
from tests.fault.schedule import BAG, schedule

SEED, DURATION_S, EVERY_S = 20261124, 44.0, 4.0
LENGTH, STREAMS, UNARY = 40, 3, 2
DEADLINE_S, BACK_S = 90.0, 120.0
CHANGED = {
    "experts": {"max_queue_rows": 60_000},  # another specification: every actor is replaced
    "router": {"max_queue_requests": 250},
    "gateway": {"max_ongoing_requests": 1000, "max_choices": 15},
}
"""Stays in force for the tests that follow, none of which depends on these limits."""


@contextmanager
def nothing_lost(served: ServedCluster) -> Iterator[Callable[[], None]]:
    """Load the cluster in the body; every answer must come and be right.

    The function given waits until more requests have been answered than can have been under way.
    """
    cases = [Case(tuple(prompt), served.expected(prompt, LENGTH)) for prompt in PROMPTS]
    load = Load(served.client, RANDOM, cases, STREAMS, UNARY, DEADLINE_S)

    def answered() -> None:
        wanted = load.outcome().requests + 2 * (STREAMS + UNARY)
        wait_until(lambda: load.outcome().requests >= wanted, "answers come", BACK_S)

    try:
        answered()
        yield answered
    finally:
        outcome = load.end()
    assert outcome.failures == {}


@pytest.mark.timeout(400)
def test_no_request_fails_and_no_token_is_wrong_whatever_dies(served: ServedCluster) -> None:
    faults = schedule(SEED, DURATION_S, EVERY_S)
    kinds = Counter(fault.kind for fault in faults)
    assert kinds == {kind: 2 * count for kind, count in Counter(BAG).items()}
    before = served.status()
    with nothing_lost(served) as answered:
        hits = inject(faults, served.status)
        after = served.wait_whole(BACK_S)
        answered()
    assert [hit.fault for hit in hits] == list(faults)
    assert after.epoch >= before.epoch + 2
    assert after.gateways == before.gateways


@pytest.mark.timeout(300)
def test_a_changed_configuration_is_deployed_without_a_loss(served: ServedCluster) -> None:
    before = served.status()
    with nothing_lost(served) as answered:
        served.args.update({name: {**served.args[name], **new} for name, new in CHANGED.items()})
        serve.run(build(served.args), name=APP, route_prefix="/")
        after = served.wait_whole(BACK_S)
        answered()
    assert after.epoch > before.epoch
    assert not {actor.pid for actor in before.actors} & {actor.pid for actor in after.actors}
    assert [actor.experts for actor in before.actors] == [actor.experts for actor in after.actors]
    assert not set(before.gateways) & set(after.gateways)
    assert not set(before.routers) & set(after.routers)
