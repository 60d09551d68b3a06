"""Ray's own fault injection: lost calls, lost answers, and answers lost while calls are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.programs import run
from tests.fault.rpc_faults import MODES, REQUESTS, environment


@pytest.mark.timeout(240)
def test_calls_that_ray_loses_cost_no_request_and_no_token(tmp_path: Path) -> None:
    told = run("rpc_faults", str(tmp_path / "random"), limit_s=220.0, **environment())
    print(told)
    # The faults hit: Ray says so of each. How often the router dispatched again is printed only: a
    # lost health check has Serve replace it, and its counts with it.
    assert set(told["router"]) == set(MODES.values()), told
    assert told["gateway"], told
    # Every answer was compared with transformers', token by token.
    assert told["failures"] == {}
    assert told["requests"] >= REQUESTS
