"""Devices that fail every product: actors are replaced elsewhere, and a loop of deaths is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.programs import run

LIMIT_S = 280.0
REPLACED_S = 20.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["raise", "nan"])
def test_a_broken_device_costs_no_request_and_a_loop_of_deaths_is_told(
    tmp_path: Path, mode: str
) -> None:
    told = run("broken_devices", str(tmp_path), mode, limit_s=LIMIT_S)
    [broken, other] = told["before"]
    [successor, same] = told["after"]
    assert told["failures"] == {}  # all tokens are those of transformers
    assert told["requests"] > 0
    assert told["replaced_s"] < REPLACED_S
    # The successor is on the third node, and its neighbour is as it was.
    assert successor["node"] not in (broken["node"], other["node"])
    assert successor["experts"] == broken["experts"]
    assert (same["pid"], same["generation"]) == (other["pid"], other["generation"])
    [failing] = told["failing"]
    assert failing["actor_id"] == broken["actor_id"]
    assert ("the device is gone" if mode == "raise" else "NaN or infinity") in failing["reason"]
    looping = max(told["looping"], key=lambda actor: actor["deaths"])
    assert looping["deaths"] >= 4
    assert looping["retry_in_s"] > 0 or looping["failed_tests"] > 0 or looping["node"]
    assert told["last_failures"] == {}
