"""A request at which processes end takes a few of them down, and no other request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.programs import run

LIMIT_S = 280.0
ROUTER_DEATHS, ACTOR_DEATHS = 3, 4
"""Two beside other requests, and one alone, or two."""
TOP_K = 2


@pytest.mark.timeout(300)
def test_a_request_that_ends_routers_or_actors_fails_alone(tmp_path: Path) -> None:
    told = run("poison", str(tmp_path), limit_s=LIMIT_S)
    assert told["actor"]["code"] == told["router"]["code"] == "internal"
    assert "expert actors died 4 times at this request" in told["actor"]["error"]
    assert "a router died while computing only this request" in told["router"]["error"]
    for part in "actor", "router":
        assert told[part]["failed"] == []
        assert told[part]["wrong"] == 0
    assert told["deaths"]["router"] == ROUTER_DEATHS
    assert ACTOR_DEATHS <= told["deaths"]["actor"] <= ACTOR_DEATHS * TOP_K
