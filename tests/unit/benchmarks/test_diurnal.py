"""The simulated days: devices that follow the load, and what becomes of frames."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.diurnal import (
    OBJECTIVE_S,
    SERVICE_S,
    STEP_S,
    Course,
    Devices,
    by_policy,
    least_fixed,
    load_of,
    picture,
    play,
)

STEPS = round(6 * 3600 / STEP_S)


def follow(load: np.ndarray, first: int = 40) -> Course:
    return play(load, first, 60.0, 1, by_policy(200))


def test_a_steady_load_waits_as_the_formula_says_and_moves_nothing() -> None:
    devices = Devices(10, 60.0, 1)
    devices._share[:] = 1.0
    busy, wait_s = devices.step(0, 5.0)
    assert busy == pytest.approx(0.5)
    assert wait_s == pytest.approx(SERVICE_S / 2)  # half busy: half a service
    course = follow(np.full(200, 28.0))
    assert (course.changes, set(course.devices)) == (0, {40})
    assert course.misses(np.full(200, 28.0)) == 0


def test_more_than_devices_can_do_piles_up_and_is_worked_off() -> None:
    devices = Devices(10, 60.0, 1)
    devices._share[:] = 1.0
    waits = [float(devices.step(step, 12.0)[1][0]) for step in range(3)]
    assert [wait_s > OBJECTIVE_S for wait_s in waits] == [True] * 3
    assert waits == sorted(waits)
    assert devices._backlog_s.sum() == pytest.approx(3 * 2.0 * STEP_S)
    for step in range(3, 20):
        devices.step(step, 5.0)
    assert devices._backlog_s.sum() == 0


def test_devices_come_after_their_start_and_those_that_start_go_first() -> None:
    devices = Devices(10, 3 * STEP_S, 1)
    devices.bring_to(14, 0)
    assert (devices.up, devices.total) == (10, 14)
    devices.step(2, 1.0)
    assert devices.up == 10
    devices.bring_to(12, 2)
    devices.step(3, 1.0)
    assert (devices.up, devices.total) == (12, 12)
    devices.bring_to(5, 4)
    assert (devices.up, devices.total) == (5, 5)


def test_the_load_has_days_nights_and_crowds() -> None:
    load = load_of(round(24 * 3600 / STEP_S), 1000, 50, 0)
    hours = np.arange(len(load)) * STEP_S / 3600
    night, day = load[hours < 1].mean(), load[(hours > 11.5) & (hours < 12.5)].mean()
    assert day > 2.5 * night
    crowd = load[(hours > 10.1) & (hours < 10.4)].mean()
    assert crowd > 1.2 * load[(hours > 9.5) & (hours < 9.9)].mean()


def test_devices_that_follow_the_load_are_fewer_at_equal_misses() -> None:
    load = load_of(STEPS, 200, 50, 0)
    elastic = follow(load, 60)
    number, fixed = least_fixed(load, 200, 60.0, 1, elastic.misses(load), lambda step: None)
    assert fixed.misses(load) <= elastic.misses(load)
    assert set(fixed.devices) == {number}
    assert elastic.device_hours() < fixed.device_hours()
    again = follow(load, 60)
    assert (again.devices, again.missed) == (elastic.devices, elastic.missed)


def test_the_picture_has_both_ways_and_the_objective() -> None:
    courses = {
        "load": [1.0, 2.0],
        "elastic": [2.0, 3.0],
        "fixed": [4.0, 4.0],
        "wait_ms": [1.0, 90.0],
        "fixed_wait_ms": [1.0, 1.0],
    }
    svg = picture(courses, 12.0)
    assert svg.startswith("<svg")
    assert svg.count("<polyline") == 5
    assert "12 h" in svg
