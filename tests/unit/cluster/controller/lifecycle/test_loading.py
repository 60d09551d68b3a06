"""How far loading is, worked by hand."""

from __future__ import annotations

from cluster.controller.lifecycle.loading import NOTICE_S, Loading
from cluster.reports import LoadingStatus, loading_line
from cluster.spec import ActorReport, ExpertKey


def report(actor_id: str, held: int) -> ActorReport:
    keys = tuple(ExpertKey("m", 0, e) for e in range(held))
    return ActorReport(actor_id, 1, "", 1, 1, "n", "cpu", keys, held * 10**9, {}, 0, 0)


def test_nobody_loads_at_first_and_nothing_is_said() -> None:
    loading = Loading()
    assert loading.status() == ()
    assert loading.notice(1e9) is None
    loading.update(report("stranger", 3))
    loading.end("stranger")
    assert loading.status() == ()


def test_what_takes_long_is_said_once_in_a_while_for_all_together() -> None:
    loading = Loading()
    loading.begin("b", 8, 100.0)
    loading.begin("a", 4, 103.0)
    assert loading.notice(100.0 + NOTICE_S - 0.1) is None
    loading.update(report("b", 3))
    assert loading.status() == (
        LoadingStatus("a", 0, 4, 0),
        LoadingStatus("b", 3, 8, 3 * 10**9),
    )
    line = "3 of 12 experts (25%, 3.0 GB) on 2 actors"
    assert loading.notice(100.0 + NOTICE_S) == line
    assert loading.notice(100.0 + 2 * NOTICE_S - 0.1) is None
    loading.end("a")
    assert loading.notice(100.0 + 2 * NOTICE_S) == "3 of 8 experts (38%, 3.0 GB) on 1 actor"
    loading.end("b")
    assert loading.notice(1e9) is None
    loading.begin("c", 1, 1e9)  # the time begins anew
    assert loading.notice(1e9 + 1) is None


def test_a_share_of_no_experts_is_no_division_by_zero() -> None:
    assert loading_line((LoadingStatus("a", 0, 0, 0),)).startswith("0 of 0 experts (0%")
