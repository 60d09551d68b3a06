"""Random faults on all parts, while requests never stop coming."""

from __future__ import annotations

from collections import Counter

from tests.cluster_fixture import ServedCluster
from tests.fault.injector import inject
from tests.fault.nothing_lost import BACK_S, nothing_lost
from tests.fault.schedule import BAG, schedule

SEED, EVERY_S = 20261124, 4.0
TIMEOUT_S = 400


def check_chaos(served: ServedCluster, rounds: int) -> None:
    """Inject each kind of fault so many times; no request fails, and no token is wrong."""
    faults = schedule(SEED, (rounds * len(BAG) + 1) * EVERY_S, EVERY_S)
    kinds = Counter(fault.kind for fault in faults)
    assert kinds == {kind: rounds * count for kind, count in Counter(BAG).items()}
    before = served.status()
    with nothing_lost(served) as answered:
        hits = inject(faults, served.status)
        after = served.wait_whole(BACK_S)
        answered()
    assert [hit.fault for hit in hits] == list(faults)
    assert after.epoch >= before.epoch + rounds
    assert after.gateways == before.gateways
