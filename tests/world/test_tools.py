"""What is made of many worlds: smaller scenarios, tables, timelines, pictures, the command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from benchmarks.world import Tally, failure_line, scenario_of, seeds_of
from tests.world import picture, timeline
from tests.world.clients import Answer, Choice, Plan
from tests.world.coverage import Coverage
from tests.world.kernel import Process, running
from tests.world.law import Breach
from tests.world.many import Found
from tests.world.shrink import reduced, shrunk
from tests.world.streams import StreamLoop
from tests.world.weather import Event, Scenario, Setting, draw
from tests.world.world import Outcome

ROOT = Path(__file__).parents[2]

# Smaller.


@pytest.mark.parametrize("needed", [set(), {0}, {9}, {4, 5}, {0, 9}, set(range(10))])
def test_what_is_not_needed_is_dropped(needed: set[int]) -> None:
    asked: list[tuple[int, ...]] = []

    def is_enough(some: tuple[int, ...]) -> bool:
        asked.append(some)
        return needed <= set(some)

    assert set(reduced(range(10), is_enough)) == needed
    assert len(asked) <= 60
    assert len(reduced(range(8), bool)) == 1, "of items that stand for each other"


def test_events_and_requests_are_dropped_but_one_and_times_are_round_unless_they_matter() -> None:
    small = shrunk(scenario(), needs({2, 5}, {3}))
    assert [(e.what, e.at_s, e.for_s) for e in small.events] == [(2, 5.0, 1.0), (5, 8.0, 1.0)]
    assert [p.client for p in small.plans] == [3]
    assert (small.seed, small.setting) == (7, Setting())
    small = shrunk(scenario(), lambda some: any(event.at_s == 5.1234 for event in some.events))
    assert [(e.at_s, e.for_s) for e in small.events] == [(5.1234, 1.234)]
    small = shrunk(scenario(), needs(set(), set()))
    assert (len(small.events), len(small.plans)) == (0, 1)


def scenario(num_events: int = 6, num_plans: int = 9) -> Scenario:
    events = tuple(Event(3.1234 + i, "hangs", i, 1.234) for i in range(num_events))
    plans = tuple(Plan(4.0 + i, i, (i,), 1, 5.0) for i in range(num_plans))
    return Scenario(7, Setting(), plans, events)


def needs(events: set[int], plans: set[int]) -> Callable[[Scenario], bool]:
    """Return a law that these events and requests break together."""

    def breaks(some: Scenario) -> bool:
        return events <= {e.what for e in some.events} and plans <= {p.client for p in some.plans}

    return breaks


def test_it_ends_after_so_many_runs() -> None:
    asked: list[Scenario] = []

    def breaks(some: Scenario) -> bool:
        asked.append(some)
        return needs({5}, {8})(some)

    small = shrunk(scenario(), breaks, most_runs=5)
    assert len(asked) == 5
    assert needs({5}, {8})(small)


# Coverage.


def test_pairs_that_met_are_counted_once_a_seed() -> None:
    coverage = Coverage(["dies", "device yields NaN"], ["scale up", "burst"])
    assert (coverage.num_met(), coverage.num_pairs()) == (0, 4)
    for hit in ([], ["dies"], ["dies", "dies", "burst"], ["hangs", "dies", "burst", "scale up"]):
        coverage.add(hit)
    assert coverage.table().splitlines() == [
        "                          scale",
        "                   seeds     up  burst",
        "seeds                         1      2",
        "dies                   3      1      2",
        "device yields NaN      ·      ·      ·",
    ]
    assert coverage.num_met() == 2


def test_seeds_and_files_on_the_command_line(tmp_path: Path) -> None:
    assert seeds_of("3:7") == range(3, 7)
    assert seeds_of("5") == range(5, 6)
    for wrong in ("", "a", "1:", "1:b", "1:2:3"):
        with pytest.raises(argparse.ArgumentTypeError):
            seeds_of(wrong)
    assert scenario_of("5") == (draw(5), "world-5")
    file = tmp_path / "small.json"
    file.write_text(json.dumps(scenario().to_json()))
    assert scenario_of(str(file)) == (scenario(), "small")


# The command.


def found(seed: int, *laws: str) -> Found:
    breaches = tuple((law, 1.0, "so") for law in laws)
    return Found(seed, breaches, ("dies", "burst"), 1, 10, 20, 2, 0.5)


def test_the_tally_of_seeds() -> None:
    tally = Tally()
    for one in (found(4, "x"), found(2, "y", "x"), found(3), found(9, "z")):
        tally.add(one)
    assert tally.counts["seeds"] == 4
    assert tally.counts["tokens"] == 80
    assert tally.laws() == {"x": [2, 4], "y": [2], "z": [9]}
    assert tally.to_shrink() == [(2, "x"), (9, "z")]
    assert tally.coverage.pairs["dies", "burst"] == 4
    assert failure_line(2, {"y", "x"}) == "python -m benchmarks.world --replay 2  # x; y"


@pytest.mark.timeout(300)
def test_the_command_replays_a_file_and_a_second_run_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "calm.json"
    calm = Scenario(1, Setting(), (Plan(3.0, 0, (1, 2), 4, 9.0),), (Event(3.1, "scale up"),))
    file.write_text(json.dumps(calm.to_json()))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.world", "--replay", str(file), "--svg", tmp_path],
        env={k: v for k, v in {**os.environ, "PYTHONPATH": str(ROOT)}.items()
             if k != "PYTHONHASHSEED"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "request 3.000: whole, 4 tokens, of a" in done.stdout
    assert "scale up" in done.stdout
    assert "a second run is the same" in done.stdout
    ElementTree.parse(tmp_path / "calm.svg")


# Timelines and pictures.


def outcome() -> Outcome:
    """Return an outcome by hand: two processes, two requests, two events, one breach."""
    actor = Process("expertmesh:world:expert-0:g1", "node-0", 1000, begun_at_s=0.5)
    actor.ended_at_s = 4.0
    router = Process("router/1", "node-1", 1001)
    right = Answer(Plan(3.0, 0, (1,), 2, 5.0), [Choice([1, 2], "a", True, "length")], 3.0, 3.5)
    wrong = Answer(
        Plan(3.25, 1, (1, 2), 2, 5.0, n=2, is_streamed=False), [Choice(), Choice()], 3.25, 4.5,
        "UnavailableError", "expertmesh:world:expert-0:g1 is gone",
    )  # fmt: skip
    events = [Event(3.5, "hangs", 3, 2.0, role="actor"), Event(4.0, "links cut", 1, 1.0)]
    breach = Breach("what can be served is served", 20.0, "UnavailableError at 3.250: <gone>")
    trace = [
        "   0.0000 router/1 begins on node-1",
        "   3.5000 hangs actor 3 for 2.00 s: expertmesh:world:expert-0:g1",
        "   4.0000 expertmesh:world:expert-0:g1 ends on node-0",
        "   4.0000 links cut 1 for 1.00 s",
        f"  20.0000 BROKEN {breach.law}: {breach.text}",
    ]
    return Outcome(
        replace(scenario(), events=tuple(events)), [breach], trace, events, 0xABC, 9, 2,
        answers=[right, wrong], targets=[actor.name, ""], processes=[router, actor],
    )  # fmt: skip


def test_the_timeline_tells_all_in_its_order() -> None:
    logged = [timeline.Line(3.75, "router/1", "warning of x: expertmesh:world:expert-0:g1\nmore")]
    assert timeline.text(outcome(), logged).splitlines() == [
        "   0.0000  router/1        begins on node-1",
        "   3.0000  client 0        request 3.000: 1+2 tokens in 5 s",
        "   3.2500  client 1        request 3.250: 2+2 tokens in 5 s, n=2, unary",
        "   3.5000  client 0        request 3.000: whole, 2 tokens, of a",
        "   3.5000  world           hangs actor 3 for 2.00 s: expert-0:g1",
        "   3.7500  router/1        warning of x: expert-0:g1",
        "                           more",
        "   4.0000  expert-0:g1     ends on node-0",
        "   4.0000  world           links cut 1 for 1.00 s",
        "   4.5000  client 1        request 3.250: UnavailableError, 0+0 tokens, "
        "expert-0:g1 is gone",
        "  20.0000  world           BROKEN what can be served is served: "
        "UnavailableError at 3.250: <gone>",
    ]


def test_what_the_product_logs_is_kept_with_the_worlds_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel, log = StreamLoop(0), logging.getLogger("expertmesh.test")
    with running(kernel), timeline.recorded() as records:
        kernel.call_later(1.5, log.warning, "%s fails", "it")
        kernel.call_later(1.6, log.info, "nobody wants to know")
        with kernel.within(kernel.process("router/1", "node-0")):
            kernel.call_later(2.0, log.error, "it fails again")
        kernel.run(3.0)
    log.warning("after the end")
    assert records.lines == [
        timeline.Line(1.5, "world", "warning of expertmesh.test: it fails"),
        timeline.Line(2.0, "router/1", "error of expertmesh.test: it fails again"),
    ]
    assert capsys.readouterr().out == ""


def test_the_picture_has_all_and_marks_what_broke() -> None:
    drawn = picture.svg(outcome())
    ElementTree.fromstring(drawn)
    for words in ("router/1", "expert-0:g1", "node-0", "node-1", "hangs expert-0:g1", "links cut"):
        assert f">{words}</text>" in drawn
    assert "what can be served is served: UnavailableError at 3.250: &lt;gone&gt;" in drawn
    shapes = drawn.splitlines()
    [red] = [shape for shape in shapes if "request 3.250 of client 1" in shape]
    [green] = [shape for shape in shapes if "request 3.000 of client 0" in shape]
    assert picture.BROKEN in red
    assert picture.COLORS["whole"] in green
    assert sum(f'fill="{picture.HUNG}"' in shape for shape in shapes) == 2  # it, and the legend


def test_bars_lie_on_nobody() -> None:
    pieces = [picture.Piece(a, b, "", "") for a, b in [(0, 2), (1, 3), (2, 4), (2.5, 9), (4, 5)]]
    rows = picture.packed(pieces, lambda piece: (piece.begun_s, piece.ended_s))
    assert [[p.begun_s for p in row] for row in rows] == [[0, 2, 4], [1], [2.5]]
    assert picture.packed([], lambda piece: (0.0, 0.0)) == []


PARENT = """
import os, time
from tests.world.many import workers
with workers(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_workers_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    _, alive = psutil.wait_procs([worker], timeout=30.0)
    assert alive == []
