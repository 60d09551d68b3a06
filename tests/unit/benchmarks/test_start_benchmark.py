"""What the benchmark of a start makes of processes and of several starts."""

from __future__ import annotations

import pytest

from benchmarks.start import RAY, Start, process_name, summary


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ray::ServeReplica:expertmesh:Router-mesh-tiny", "router"),
        ("ray::ServeReplica:expertmesh:Gateway.handle_request", "gateway"),
        ("ray::ServeReplica:hello:Hello", RAY),
        ("ray::RemoteExpertActor", "expert actor"),
        ("ray::ServeController", RAY),
        ("", RAY),
    ],
)
def test_processes_are_told_by_the_part_that_they_are(line: str, name: str) -> None:
    assert process_name(line) == name


def test_starts_are_told_by_their_medians_and_parts_that_one_lacks_count_as_nothing() -> None:
    starts = [
        Start(3.0, 1.0, {RAY: 5.0, "router": 2.0}),
        Start(1.0, 4.0, {RAY: 1.0}),
        Start(2.0, 2.0, {RAY: 3.0, "router": 1.0}),
    ]
    told = summary(starts)
    assert (told["answer_s"], told["answers_s"], told["end_s"]) == (2.0, [3.0, 1.0, 2.0], 2.0)
    assert told["cpu_s"] == {RAY: 3.0, "router": 1.0}
