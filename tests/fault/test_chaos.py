"""Random faults on all parts, while requests never stop coming.

No request fails, and no token is lost, doubled or wrong.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cluster_fixture import ServedCluster
from tests.fault.injector import inject
from tests.fault.nothing_lost import BACK_S, nothing_lost
from tests.fault.schedule import BAG, schedule

SEED, DURATION_S, EVERY_S = 20261124, 44.0, 4.0


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
