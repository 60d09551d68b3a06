"""Every kind of fault several times, in a random order, while requests never stop coming."""

from __future__ import annotations

import pytest

from tests.cluster_fixture import ServedCluster
from tests.fault.chaos import TIMEOUT_S, check_chaos


@pytest.mark.timeout(TIMEOUT_S)
def test_no_request_fails_and_no_token_is_wrong_though_all_die_again(
    served: ServedCluster,
) -> None:
    check_chaos(served, rounds=3)
