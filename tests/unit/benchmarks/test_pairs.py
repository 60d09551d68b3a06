"""What pairs of old and new say, how processor time is read, and what the command refuses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import pairs
from benchmarks.checkout import Commit, Side, commit_of
from benchmarks.pairs import (
    MAX_RATIO,
    Pair,
    Turn,
    by_turns,
    coverage,
    median_interval,
    ms_per_token,
    report,
    summarize,
    take_turn,
    to_json,
)
from benchmarks.processor_time import (
    ProcessId,
    ProcessTime,
    ServingProcessEndedError,
    libraries_loaded,
    serving_times,
    spent_between,
    worker_name,
)

OLD, NEW = Commit("0" * 40, "router: before"), Commit("1" * 40, "router: after")


def pair(ratio: float) -> Pair:
    """Return a pair whose new side takes ``ratio`` times as long."""
    return Pair(
        [Turn("HTTP", 100, {"router": 1.0, "Gateway": 1.0})],
        [Turn("HTTP", 200, {"router": 2.0, "Gateway": 4.0 * ratio - 2.0})],
    )


@pytest.mark.parametrize(
    ("count", "rank", "expected"),
    [
        (1, 1, 0.0),
        (4, 1, 1 - 2 / 16),
        (5, 1, 1 - 2 / 32),
        (10, 2, 1 - 2 * (1 + 10) / 1024),
        (10, 3, 1 - 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_how_probably_two_ranks_enclose_the_median(count: int, rank: int, expected: float) -> None:
    assert coverage(count, rank) == pytest.approx(expected)


def test_the_interval_of_ten_values_by_hand() -> None:
    # Ranks 2 and 3 cover 1002 and 912 of 1024, 0.9 are 921.6: excess 80.4 / 90 = 0.89333, weight
    # 8 * 0.89333 / (2 + 6 * 0.89333) = 0.97101.
    values = [float(i) for i in range(10, 0, -1)]
    assert median_interval(values) == pytest.approx((2.97101, 8.02899), abs=1e-5)


@pytest.mark.parametrize("count", range(5))
def test_fewer_than_five_values_have_no_interval(count: int) -> None:
    assert median_interval([1.0] * count) is None


@pytest.mark.parametrize("count", [5, 10, 13, 40])
def test_nine_of_ten_intervals_hold_the_median(count: int) -> None:
    draw = random.Random(count)
    held = 0
    for _ in range(2000):
        interval = median_interval([draw.lognormvariate(0.0, 0.5) for _ in range(count)])
        assert interval is not None
        held += interval[0] <= 1.0 <= interval[1]
    assert held / 2000 == pytest.approx(0.9, abs=0.025)


def test_each_pair_is_kept_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"decode": [pair(1.0)] * 10, "serve": [pair(1.2)] * 10}
    kept = json.loads(json.dumps(to_json(OLD, NEW, measured)))
    assert (kept["old"]["commit"], kept["new"]["subject"]) == (OLD.hash, NEW.subject)
    assert [one["ratio"] for one in kept["cases"]["serve"]["pairs"]] == pytest.approx([1.2] * 10)
    turn = {"work": "HTTP", "tokens": 100, "cpu_s": {"router": 1.0, "Gateway": 1.0}}
    assert kept["cases"]["serve"]["pairs"][0]["old"] == [turn]
    assert kept["cases"]["decode"]["interval"] == pytest.approx([1.0, 1.0])
    report(measured)
    shown = capsys.readouterr().out
    assert "no slower" in shown
    assert "serve: Gateway" in shown


def test_a_run_that_ends_early_shows_the_pairs_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(measured: dict[str, list[Pair]], *_: object) -> None:
        measured["serve"] = [pair(1.0)] * 4
        raise RuntimeError("new was silent")

    monkeypatch.setattr(pairs, "run", ends)
    with pytest.raises(RuntimeError, match="new was silent"):
        pairs.main(["HEAD"])
    assert "too few pairs" in capsys.readouterr().out


def test_a_commit_that_is_none_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(commit_of("HEAD").hash) == 40
    for arguments in (["no-such-commit"], ["HEAD", "--pairs", "0"], ["HEAD:README.md"]):
        with pytest.raises(SystemExit):
            pairs.main(arguments)
    assert "no-such-commit names no commit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ray::ServeReplica:expertmesh:Router-bench", "Router-bench"),
        ("ray::ServeReplica:expertmesh:Gateway-1a2b3c.handle_request", "Gateway-1a2b3c"),
        ("ray::RemoteExpertActor.load", "RemoteExpertActor"),
        ("ray::ServeController", "ServeController"),
        ("ray::IDLE", None),
        ("ray::IDLE_SpillWorker", None),
        ("ray::DashboardAgent", None),
        ("ray::RuntimeEnvAgent", None),
        ("/usr/bin/raylet --node_ip_address=127.0.0.1", None),
        ("", None),
    ],
)
def test_workers_are_named_by_class_or_deployment(line: str, name: str | None) -> None:
    assert worker_name(line) == name


ROUTER, CHILD, ACTOR = ProcessId(1, 0.0), ProcessId(2, 0.0), ProcessId(3, 0.0)


def test_time_is_of_between_and_a_new_process_begins_at_nothing() -> None:
    before = {ROUTER: ProcessTime("router", 0, 5.0)}
    after = {
        ROUTER: ProcessTime("router", 0, 7.0),
        ACTOR: ProcessTime("Actor", 9, 0.5),
        ProcessId(1, 8.0): ProcessTime("Actor", 9, 0.25),  # the same pid, another process
    }
    assert spent_between(before, after) == {"router": 2.0, "Actor": 0.75}


def test_an_ended_child_s_time_is_counted_once() -> None:
    before = {ROUTER: ProcessTime("router", 0, 5.0), CHILD: ProcessTime("haproxy", 1, 3.0)}
    after = {ROUTER: ProcessTime("router", 0, 10.0)}  # 1 of its own, and the child's 3 + 1
    assert sum(spent_between(before, after).values()) == pytest.approx(2.0)


def test_a_worker_that_ended_is_no_measurement() -> None:
    before = {ROUTER: ProcessTime("router", 0, 5.0), ACTOR: ProcessTime("Actor", 9, 3.0)}
    with pytest.raises(ServingProcessEndedError, match="Actor"):
        spent_between(before, {ROUTER: ProcessTime("router", 0, 6.0)})


class TwoGateways(Side):
    """A side whose gateways are of two deployments, one of which has followed the other."""

    def __init__(self) -> None:
        self._spent_s = iter([1.0, 3.0])

    def times(self) -> dict[ProcessId, ProcessTime]:
        spent_s = next(self._spent_s)
        names = ("Router-bench", "Gateway-1a2b3c", "Gateway-0f0f0f", "Gateway-of-another")
        return {
            ProcessId(pid, 0.0): ProcessTime(name, 0, spent_s) for pid, name in enumerate(names)
        }


def test_gateways_of_all_deployments_count_as_one_process() -> None:
    turn = take_turn(TwoGateways(), "HTTP", lambda: 8)
    assert turn.tokens == 8
    assert turn.cpu_s == {"Router-bench": 2.0, "Gateway": 4.0, "Gateway-of-another": 2.0}


ROOT_CODE = """
import subprocess, sys
def start(title, code):
    command = [title, "-c", code, sys.executable]  # which a process of such a title cannot know
    return subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE, text=True)
others = [start(title, "import sys; sys.stdin.read()") for title in ("ray::IDLE", "raylet")]
gateway = start("ray::ServeReplica:app:Gateway", sys.argv[1])
for line in sys.stdin:
    gateway.stdin.write(line)
    gateway.stdin.flush()
for process in (gateway, *others):
    process.communicate()
"""
GATEWAY_CODE = """
import subprocess, sys
waits = "import sys; print('started', flush=True); sys.stdin.read()"
burns = "import time\\nwhile time.process_time() < 0.4: pass"
child = subprocess.Popen([sys.argv[1], "-c", waits], stdin=subprocess.PIPE)
for line in sys.stdin:
    subprocess.run([sys.argv[1], "-c", burns])
    print("burnt", flush=True)
child.communicate()
"""


@pytest.fixture
def served_tree() -> Iterator[subprocess.Popen[str]]:
    """Run a gateway with a child, an idle worker and a raylet, by their titles, below a process.

    For each line that the gateway is sent it has another child spend 0.4 s and end.
    """
    command = [sys.executable, "-c", ROOT_CODE, GATEWAY_CODE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as root:
        assert root.stdout.readline() == "started\n"
        yield root


def test_all_below_a_worker_serves_and_ray_s_own_processes_do_not(
    served_tree: subprocess.Popen[str],
) -> None:
    names = Counter(process.name for process in serving_times(served_tree.pid, "router").values())
    assert (names["router"], names["Gateway"], names.total()) == (1, 1, 3)
    assert "router" not in {p.name for p in serving_times(served_tree.pid, None).values()}


def test_the_time_of_a_child_that_came_and_ended_meanwhile_is_its_parent_s(
    served_tree: subprocess.Popen[str],
) -> None:
    before = serving_times(served_tree.pid, "router")
    served_tree.stdin.write("burn\n")
    served_tree.stdin.flush()
    assert served_tree.stdout.readline() == "burnt\n"
    spent = spent_between(before, serving_times(served_tree.pid, "router"))
    assert spent["Gateway"] >= 0.38  # ticks of 10 ms
    assert spent["router"] < 0.1


def test_a_process_tells_whose_library_it_has_loaded() -> None:
    import expertmesh_native

    own = Path(expertmesh_native.__file__)
    times = serving_times(os.getpid(), "pytest")
    assert libraries_loaded(times, {own.name}) == {own.resolve()}
    assert libraries_loaded(times, {"another.so"}) == set()


def test_a_ratio_is_of_processor_seconds_per_token_and_ways_to_ask_count_alike() -> None:
    assert pair(1.25).ratio == pytest.approx(1.25)
    [turn] = pair(1.25).old
    assert [turn.ms_per_token(*of) for of in ((), ("router",), ("haproxy",))] == [20.0, 10.0, 0.0]
    turns = [Turn("HTTP", 10, {"router": cpu_s}) for cpu_s in (0.1, 0.9, 0.1, 0.12, 0.12)]
    assert ms_per_token(turns) == pytest.approx(12.0), "one turn beside other work does not count"
    old = [Turn(way, 10, {"Gateway": 0.1}) for way in ("HTTP", "gRPC") for _ in range(3)]
    new = [*old[:3], *(Turn("gRPC", 10, {"Gateway": 0.2}) for _ in range(2))]
    assert ms_per_token(new) == pytest.approx((10.0 + 20.0) / 2)
    assert Pair(old, new).ratio == pytest.approx(1.5)
    assert by_turns(3, 1) == [1, 0, 1, 0, 1, 0], "sides take turns, and either can begin"


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.5], "too few pairs"),
        ([0.5] * 9, "too few pairs"),
        ([0.5] * 10, "no slower"),
        ([MAX_RATIO] * 10, "no slower"),
        ([MAX_RATIO + 1e-9] * 10, "slower"),
        ([1.0] * 8 + [1.5] * 2, "no slower"),  # the upper end is the 8th value and 3 % of the 9th
        ([1.0] * 7 + [1.5] * 3, "slower"),
        ([1.04] * 5 + [1.06] * 5, "slower"),  # the median is no more than 1.05, the interval is
    ],
)
def test_the_verdict_is_of_the_interval_s_upper_end_and_the_exit_status_the_verdict(
    ratios: list[float], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert summarize([]).verdict == "too few pairs"
    assert summarize(ratios).verdict == verdict
    measured = {"decode": [pair(ratio) for ratio in ratios], "serve": [pair(1.0)] * 10}
    monkeypatch.setattr(pairs, "run", lambda given, *_: given.update(measured))
    assert pairs.main(["HEAD"]) == (verdict != "no slower")
