"""The fault tools themselves: a schedule is a function of its seed, and answers are checked."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest

from cluster.reports import ActorStatus, ClusterStatus, ProcessStatus
from tests.fault.injector import Hit, due_s, inject, victims
from tests.fault.load import Case, WrongTokensError, answers_of, check_next, check_whole
from tests.fault.schedule import BAG, PAUSE_S, Fault, Kind, schedule
from tests.fault.signals import kill, let_go, stop

STATUS = ClusterStatus(
    ("m",), 1, 1, 10, 0, (ProcessStatus(11, "n"),), (ProcessStatus(12, "n"),),
    (ActorStatus("expert-0", 13, "n", "cpu", 1, (), 0),),
)  # fmt: skip


def test_a_schedule_is_a_function_of_its_seed() -> None:
    assert schedule(3, 1200, 5) == schedule(3, 1200, 5)
    assert schedule(3, 1200, 5) != schedule(4, 1200, 5)
    assert schedule(1, 4.9, 5) == ()  # shorter than a period


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_has_a_fault_in_every_period_and_all_kinds_in_every_bag(seed: int) -> None:
    faults = schedule(seed, 105, 5)
    assert len(faults) == 20
    for place, fault in enumerate(faults, 1):
        assert abs(fault.at_s - 5 * place) <= 0.3 * 5
        paused = fault.kind is Kind.PAUSE_ACTOR
        assert PAUSE_S[0] <= fault.pause_s <= PAUSE_S[1] if paused else fault.pause_s == 0
    assert [f.at_s for f in faults] == sorted(f.at_s for f in faults)
    for begin in range(0, 20, len(BAG)):
        kinds = [fault.kind for fault in faults[begin : begin + len(BAG)]]
        assert Counter(kinds) == Counter(BAG)


def test_a_late_fault_makes_those_after_it_late_and_none_comes_sooner() -> None:
    first, second, third = (Fault(at_s, Kind.KILL_ROUTER, 0, 0.0) for at_s in (5.0, 9.0, 16.0))
    hits: list[Hit] = []
    assert due_s(first, hits) == 5.0
    hits.append(Hit(first, 11, 5.5))
    assert due_s(second, hits) == 9.5
    hits.append(Hit(second, 11, 20.0))
    assert due_s(third, hits) == 27.0


def test_redeploys_are_carried_out_between_the_others() -> None:
    hits: list[str] = []
    faults = [Fault(0.0, Kind.REDEPLOY, 0, 0.0), Fault(0.01, Kind.REDEPLOY, 0, 0.0)]
    victim = replace(STATUS, actors=(replace(STATUS.actors[0], pid=os.getpid()),))
    told = inject(faults, lambda: victim, redeploy=lambda: hits.append("redeployed"))
    assert hits == ["redeployed"] * 2
    assert [(hit.fault.kind, hit.pid) for hit in told] == [(Kind.REDEPLOY, 0)] * 2


def test_an_answer_is_wholly_of_one_of_the_deployed_models() -> None:
    case = Case((1,), (5, 6, 7), ((5, 8, 9),))
    assert answers_of(case, ()) == [(5, 6, 7), (5, 8, 9)]
    assert answers_of(case, (5,)) == [(5, 6, 7), (5, 8, 9)]
    assert answers_of(case, (5, 8)) == [(5, 8, 9)]
    for mixed in [(5, 6, 9), (5, 8, 7), (6,)]:
        with pytest.raises(WrongTokensError):
            answers_of(case, mixed)


@pytest.mark.parametrize(("missing", "actors"), [(0, (13,)), (1, ())])
def test_each_kind_has_its_own_victims_and_actors_are_none_while_an_expert_has_no_copy(
    missing: int, actors: tuple[int, ...]
) -> None:
    known = replace(STATUS, missing_experts=missing)
    assert {kind: victims(known, kind) for kind in Kind} == {
        Kind.KILL_ACTOR: actors,
        Kind.PAUSE_ACTOR: actors,
        Kind.KILL_ROUTER: (11,),
        Kind.KILL_CONTROLLER: (10,),
        Kind.REDEPLOY: actors,  # nobody; it comes when all experts are there
    }


@pytest.mark.parametrize("tool", [kill, stop])
def test_a_process_that_the_status_does_not_name_gets_no_signal(tool: object) -> None:
    with pytest.raises(AssertionError, match="not processes of the cluster"):
        tool(replace(STATUS, actors=()), 13)  # type: ignore[operator]


def test_only_a_stopped_process_is_let_go() -> None:
    with pytest.raises(AssertionError):
        let_go(STATUS, 1 << 30)


def test_tokens_must_come_once_and_in_order() -> None:
    expected = (5, 6, 7, 8)
    check_next((), (5, 6), expected)
    check_next((5, 6), (7, 8), expected)
    check_next((5, 6), (), expected)
    check_whole((5, 6, 7, 8), expected)
    for came, piece in [((5,), (5,)), ((5,), (7,)), ((5, 6, 7, 8), (9,))]:
        with pytest.raises(WrongTokensError):
            check_next(came, piece, expected)
    with pytest.raises(WrongTokensError):
        check_whole((5, 6, 7), expected)
