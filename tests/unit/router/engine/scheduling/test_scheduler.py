"""Continuous batching: pages, admission, and which tokens a step computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import OverloadedError
from router.engine.scheduling.scheduler import Limits, Scheduler
from router.engine.sequence import ScheduledChunk, Sequence
from router.messages.request import GenerationRequest, SamplingParams
from router.model.page_pool import PagePool, pages_needed

PAGE_SIZE = 16


def request_of(request_id: str, length: int, max_tokens: int = 4, n: int = 1) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    return GenerationRequest(request_id, "m", tuple(range(1, length + 1)), sampling, 0.0)


def computed(work: list[ScheduledChunk]) -> list[tuple[str, int, int]]:
    return [(w.sequence.request.request_id, w.start, w.end) for w in work]


def advance(scheduler: Scheduler, work: list[ScheduledChunk]) -> list[Sequence]:
    """Do a step's work as the engine does: count it, sample, finish; returns who sampled."""
    sampled = []
    for item in work:
        item.sequence.num_computed = item.end
    for item in work:
        if item.sequence.num_computed == len(item.sequence.token_ids):
            item.sequence.token_ids.append(99)
            sampled.append(item.sequence)
            if item.sequence.num_generated == item.sequence.request.sampling.max_tokens:
                scheduler.finish(item.sequence)
    return sampled


# Pages.


def test_a_pool_hands_out_each_page_once_and_none_that_it_does_not_have() -> None:
    pool = PagePool(5, PAGE_SIZE)
    first, second = pool.take(2), pool.take(3)
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.give_back(first)
    assert pool.num_free == 2
    with pytest.raises(IndexError, match="3 pages asked for, 2 free"):
        pool.take(3)
    assert sorted(pool.take(2)) == sorted(first)


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_pages_are_rounded_up(tokens: int, pages: int) -> None:
    assert pages_needed(tokens, PAGE_SIZE) == pages


# Admission.


def test_pages_are_reserved_for_all_that_a_sequence_may_ever_need() -> None:
    scheduler = Scheduler(Limits(8, 100, 10), 10, PAGE_SIZE)
    scheduler.add(request_of("a", 10, 6))  # 16 tokens: one page
    scheduler.add(request_of("b", 10, 7))  # 17 tokens: two
    scheduler.schedule()
    assert scheduler.num_free_pages == 7
    assert [len(s.pages) for s in scheduler.running] == [1, 2]


def test_no_pages_are_kept_while_parked_sequences_hold_them() -> None:
    scheduler = Scheduler(Limits(8, 1000, 10), 4, PAGE_SIZE)
    scheduler.add(request_of("a", 2 * PAGE_SIZE, 1))  # three pages
    scheduler.schedule()
    scheduler.running[0].awaited = frozenset({(0, 1)})
    scheduler.add(request_of("b", PAGE_SIZE, 1))  # two
    for name in "cdef":
        scheduler.add(request_of(name, 1, 1))
        scheduler.schedule()
        assert scheduler.running[-1].request.request_id == name
        scheduler.finish(scheduler.running[-1])


def test_requests_are_admitted_by_priority_then_by_arrival() -> None:
    scheduler = Scheduler(Limits(1, 100, 10), 100, PAGE_SIZE)
    for name, priority in (("a", 0), ("b", 3), ("c", -1), ("d", 3), ("e", 0)):
        scheduler.add(replace(request_of(name, 5), priority=priority))
    order = []
    while scheduler.sequences():
        scheduler.schedule()
        [sequence] = scheduler.running
        order.append(sequence.request.request_id)
        scheduler.finish(sequence)
    assert order == ["c", "a", "e", "b", "d"]


def test_no_sequence_is_evicted_whatever_its_priority() -> None:
    scheduler = Scheduler(Limits(8, 100, 10), 2, PAGE_SIZE)
    scheduler.add(replace(request_of("a", PAGE_SIZE, 5), priority=9))
    advance(scheduler, scheduler.schedule())
    scheduler.add(replace(request_of("b", 3, 1), priority=-9))
    assert computed(scheduler.schedule()) == [("a", PAGE_SIZE, PAGE_SIZE + 1)]


def test_every_choice_is_a_sequence_of_its_own() -> None:
    scheduler = Scheduler(Limits(8, 100, 10), 10, PAGE_SIZE)
    added = scheduler.add(request_of("a", 3, n=3))
    assert [s.index for s in added] == [0, 1, 2]
    added[0].token_ids.append(7)
    assert added[1].token_ids == [1, 2, 3]
    scheduler.schedule()
    assert scheduler.running == added
    assert len({page for s in added for page in s.pages}) == 3


def test_a_full_queue_refuses_the_next_request_with_a_hint() -> None:
    scheduler = Scheduler(Limits(1, 100, 5), 100, PAGE_SIZE)
    scheduler.add(request_of("a", 3, n=4))  # counts as four
    with pytest.raises(OverloadedError, match=r"is full: 1 requests \(4 choices\) waiting"):
        scheduler.add(request_of("b", 3, n=2))
    scheduler.add(request_of("b", 3))
    with pytest.raises(OverloadedError, match=r"full: 2 requests .5 choices. wait") as caught:
        scheduler.add(request_of("c", 3))
    assert (caught.value.field, caught.value.retry_after_s) == ("queue", 1.0)
    assert len(scheduler.sequences()) == 5


def test_a_queue_is_bounded_by_tokens_too() -> None:
    scheduler = Scheduler(Limits(1, 100, 9, max_queue_tokens=40), 100, PAGE_SIZE)
    scheduler.add(request_of("a", 50, 10))  # one alone may be more
    scheduler.schedule()
    scheduler.add(request_of("b", 3, 7, n=2))
    scheduler.add(request_of("c", 10, 10))  # 40 in all
    with pytest.raises(OverloadedError, match=r"full: 2 requests .40 tokens. wait") as caught:
        scheduler.add(request_of("d", 1, 1))
    assert caught.value.retry_after_s == 1.0
    scheduler.finish(next(iter(scheduler.waiting)))
    scheduler.add(request_of("d", 5, 5))
    for sequence in scheduler.sequences():
        scheduler.finish(sequence)
    scheduler.add(request_of("e", 30, 10))
    scheduler.schedule()
    scheduler.add(request_of("f", 30, 10))


def test_a_request_that_could_never_fit_is_refused_without_a_hint() -> None:
    scheduler = Scheduler(Limits(1, 100, 2), 2, PAGE_SIZE)
    scheduler.add(request_of("a", 30, 2))  # 32 tokens: exactly all
    with pytest.raises(OverloadedError, match="need 33 cache tokens; a router has 32") as caught:
        scheduler.add(request_of("b", 30, 3))
    assert caught.value.retry_after_s is None
    assert [s.request.request_id for s in scheduler.sequences()] == ["a"]


# The step's work.


def test_decodes_come_first_and_prefill_gets_the_rest_of_the_budget() -> None:
    scheduler = Scheduler(Limits(8, 10, 10), 100, PAGE_SIZE)
    for name in "ab":
        scheduler.add(request_of(name, 3))
    advance(scheduler, scheduler.schedule())
    scheduler.add(request_of("long", 30))
    assert computed(scheduler.schedule()) == [("a", 3, 4), ("b", 3, 4), ("long", 0, 8)]


def test_short_prompts_pass_a_long_one_which_is_left_out_of_every_second_step_at_most() -> None:
    scheduler = Scheduler(Limits(8, 16, 10), 100, PAGE_SIZE)
    scheduler.add(request_of("long", 200))
    advance(scheduler, scheduler.schedule())
    for name in "ab":
        scheduler.add(request_of(name, 15))
    for expected in (
        [("a", 0, 15), ("b", 0, 1)],
        [("a", 15, 16), ("long", 16, 19), ("b", 1, 13)],
        [("a", 16, 17), ("b", 13, 15)],  # no full step, whose end b's token would wait for
        [("a", 17, 18), ("b", 15, 16), ("long", 19, 33)],
    ):
        work = scheduler.schedule()
        assert computed(work) == expected
        advance(scheduler, work)


def test_a_long_prompts_part_is_less_the_further_it_has_come() -> None:
    scheduler = Scheduler(Limits(8, 64, 10), 100, PAGE_SIZE, even_context=128)
    scheduler.add(request_of("long", 1000))
    for _ in range(6):
        advance(scheduler, scheduler.schedule())
    for name in "ab":
        scheduler.add(request_of(name, 60))
    advance(scheduler, scheduler.schedule())
    # A token after 384 others costs as much as 4 without.
    assert computed(scheduler.schedule()) == [("a", 60, 61), ("long", 384, 387), ("b", 4, 60)]


def test_a_prompt_of_one_token_does_not_wait_for_a_full_step() -> None:
    scheduler = Scheduler(Limits(8, 16, 10), 100, PAGE_SIZE)
    scheduler.add(request_of("long", 200))
    advance(scheduler, scheduler.schedule())
    scheduler.add(request_of("a", 1))
    for expected in ([("a", 0, 1)], [("a", 1, 2), ("long", 16, 31)]):
        work = scheduler.schedule()
        assert computed(work) == expected
        advance(scheduler, work)


def test_the_choices_of_a_request_count_together() -> None:
    scheduler = Scheduler(Limits(8, 16, 10), 100, PAGE_SIZE)
    scheduler.add(request_of("many", 6, n=4))
    scheduler.add(request_of("a", 10))
    assert computed(scheduler.schedule()) == [("many", 0, 6), ("a", 0, 10)]


def test_a_lower_number_is_prefilled_first_and_the_oldest_keeps_a_part() -> None:
    scheduler = Scheduler(Limits(8, 16, 10), 100, PAGE_SIZE)
    scheduler.add(request_of("a", 12))
    scheduler.add(request_of("b", 12))
    scheduler.add(replace(request_of("urgent", 40), priority=-1))
    assert computed(scheduler.schedule()) == [("urgent", 0, 12), ("a", 0, 4)]


def test_a_prompts_last_token_alone_is_computed_with_the_decodes() -> None:
    scheduler = Scheduler(Limits(8, 4, 10), 100, PAGE_SIZE)
    scheduler.add(request_of("a", 5))
    scheduler.add(request_of("b", 9))
    advance(scheduler, scheduler.schedule())
    work = scheduler.schedule()
    assert computed(work) == [("a", 4, 5), ("b", 0, 3)]
    assert work[0].end == len(work[0].sequence.token_ids)


def test_scheduling_alone_changes_no_sequence() -> None:
    scheduler = Scheduler(Limits(8, 8, 10), 100, PAGE_SIZE)
    scheduler.add(request_of("a", 20))
    assert computed(scheduler.schedule()) == computed(scheduler.schedule()) == [("a", 0, 8)]


def test_finishing_frees_pages_once_wherever_the_sequence_is() -> None:
    scheduler = Scheduler(Limits(1, 100, 10), 10, PAGE_SIZE)
    [running] = scheduler.add(request_of("a", 20))
    [waiting] = scheduler.add(request_of("b", 20))
    scheduler.schedule()
    assert scheduler.num_free_pages == 8
    for _ in range(2):  # a second time changes nothing
        scheduler.finish(waiting)
        assert scheduler.num_free_pages == 8
    for _ in range(2):
        scheduler.finish(running)
        assert scheduler.num_free_pages == 10
    assert scheduler.sequences() == []


REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(1, 3)), min_size=1, max_size=12
)


@settings(max_examples=60)
@given(REQUESTS, st.integers(1, 6), st.integers(1, 20), st.integers(3, 12), st.data())
def test_whatever_comes_is_served_within_the_limits(
    sizes: list[tuple[int, int, int]],
    max_batch_size: int,
    max_batch_tokens: int,
    num_pages: int,
    data: st.DataObject,
) -> None:
    scheduler = Scheduler(Limits(max_batch_size, max_batch_tokens, 100), num_pages, PAGE_SIZE)
    expected, arriving = 0, list(enumerate(sizes))
    generated = 0
    for _ in range(3000):
        while arriving and data.draw(st.booleans()):
            i, (length, max_tokens, n) = arriving.pop()
            scheduler.add(request_of(f"r{i}", min(length, 16 * num_pages - 8), max_tokens, n))
            expected += max_tokens * n
        work = scheduler.schedule()
        if not work:
            assert not scheduler.sequences()
            if not arriving:
                break
            continue
        assert len(scheduler.running) <= max_batch_size
        sizes_ = [w.end - w.start for w in work]
        # Decodes always run, each a token; prefill never takes more than what they leave.
        assert sum(sizes_) <= max(max_batch_tokens, len(work) if max(sizes_) == 1 else 0)
        assert len({id(w.sequence) for w in work}) == len(work)
        for w in work:
            assert w.start == w.sequence.num_computed < w.end <= len(w.sequence.token_ids)
        held = [page for s in scheduler.running for page in s.pages]
        assert len(held) == len(set(held)) == num_pages - scheduler.num_free_pages
        generated += len(advance(scheduler, work))
    assert generated == expected
    assert scheduler.num_free_pages == num_pages


# Tenants.


def of_tenant(name: str, request: GenerationRequest) -> GenerationRequest:
    return replace(request, tenant=name)


def test_a_flood_of_one_tenant_leaves_another_its_share_of_admission_and_prefill() -> None:
    scheduler = Scheduler(Limits(4, 64, 100), 100, PAGE_SIZE)
    for i in range(40):
        scheduler.add(of_tenant("flood", request_of(f"f{i}", 60, 4)))
    scheduler.schedule()
    scheduler.add(of_tenant("quiet", request_of("q", 60, 4)))
    assert [s.request.request_id for s in scheduler.running] == ["f0", "f1", "f2", "f3"]
    scheduler.finish(scheduler.running[0])
    assert computed(scheduler.schedule()) == [("f1", 0, 60), ("f2", 0, 4)]
    assert scheduler.running[-1].request.request_id == "f4"  # its round is under way
    scheduler.finish(scheduler.running[0])
    # The step is halved, though the quiet tenant's prompt is the last of four.
    assert computed(scheduler.schedule()) == [("f2", 0, 32), ("q", 0, 32)]


def test_a_full_queue_still_takes_a_request_of_a_tenant_of_whom_none_waits() -> None:
    scheduler = Scheduler(Limits(1, 100, 3), 100, PAGE_SIZE)
    scheduler.add(of_tenant("flood", request_of("a", 3, n=4)))  # one alone may be more
    with pytest.raises(OverloadedError, match=r"is full: 1 requests \(4 choices\) waiting"):
        scheduler.add(of_tenant("flood", request_of("b", 3)))
    scheduler.add(of_tenant("quiet", request_of("c", 3)))
    with pytest.raises(OverloadedError, match=r"is full: 2 requests \(5 choices\) waiting"):
        scheduler.add(of_tenant("quiet", request_of("d", 3)))
