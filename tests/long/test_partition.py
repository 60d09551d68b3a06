"""The network between the controller and all actors is cut: nobody is killed, no request fails."""

from __future__ import annotations

import pytest

from tests.fault.programs import run

LIMIT_S = 280.0


@pytest.mark.timeout(300)
def test_a_controller_that_is_cut_off_from_its_actors_kills_none() -> None:
    outcome = run("partition", limit_s=LIMIT_S)
    # Each part is on a node of its own.
    assert [len(networks) for networks in outcome["networks"]] == [1, 1, 1]
    assert len({networks[0] for networks in outcome["networks"]}) == 3
    assert len(outcome["before"]) == 3
    assert outcome["after"] == outcome["before"]
    assert outcome["orders"][0] == outcome["orders"][1]
    assert all("cut off" in silence for silence in outcome["idle_silences"])
    assert all("routers hear it" in silence for silence in outcome["busy_silences"])
    assert len(outcome["idle_silences"]) == len(outcome["busy_silences"]) == 3
    assert outcome["answered"] > 0
    assert outcome["failures"] == {}
