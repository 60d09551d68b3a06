"""Devices that fail every product: actors are replaced elsewhere, and a loop of deaths is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.programs import run

LIMIT_S = 280.0
REPLACED_S = 20.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["raise", "nan"])
def test_a_broken_device_costs_no_request_and_a_loop_of_deaths_is_shown(
    tmp_path: Path, mode: str
) -> None:
    found = run("broken_devices", str(tmp_path), mode, limit_s=LIMIT_S)
    [broken, other] = found["before"]
    [successor, same] = found["after"]
    assert found["failures"] == {}  # all tokens are those of transformers
    assert found["requests"] > 0
    assert found["replaced_s"] < REPLACED_S
    # The successor is on the third node, and its neighbour is as it was.
    assert successor["node"] not in (broken["node"], other["node"])
    assert successor["experts"] == broken["experts"]
    assert (same["pid"], same["generation"]) == (other["pid"], other["generation"])
    [failing] = found["failing"]
    assert failing["actor_id"] == broken["actor_id"]
    assert ("the device is gone" if mode == "raise" else "NaN or infinity") in failing["reason"]
    looping = max(found["looping"], key=lambda actor: actor["deaths"])
    assert looping["deaths"] >= 4
    assert found["last_failures"] == {}
