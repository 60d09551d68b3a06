"""Who is admitted next: by priority, then by arrival, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine.scheduling.waiting import AGED_CACHES, WaitingSequences
from router.engine.sequence import Sequence
from router.messages.request import GenerationRequest, SamplingParams

PAGE_SIZE = 16
CACHE_PAGES = 20
QUANTUM = 4 * PAGE_SIZE


class Queue:
    """A queue before a cache of 20 pages; sequences go by their arrival."""

    def __init__(self) -> None:
        self.waiting = WaitingSequences(CACHE_PAGES, PAGE_SIZE, QUANTUM)
        self.num_arrived = 0

    def add(self, num_pages: int, priority: int = 0, tenant: str = "") -> int:
        prompt = tuple(range(num_pages * PAGE_SIZE - 1))
        request = GenerationRequest(
            "r", "m", prompt, SamplingParams(1), 0.0, priority=priority, tenant=tenant
        )
        sequence = Sequence(request, 0, list(prompt), arrival=self.num_arrived)
        self.waiting.add(sequence)
        self.num_arrived += 1
        return sequence.arrival

    def next(self, num_free: int, num_attainable: int = CACHE_PAGES) -> int | None:
        sequence = self.waiting.next(num_free, num_attainable)
        return None if sequence is None else sequence.arrival


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_a_lower_priority_is_earlier_and_ties_go_by_arrival(queue: Queue) -> None:
    for priority in (0, 5, -3, 0, -3):
        queue.add(1, priority)
    assert [queue.next(20) for _ in range(6)] == [2, 4, 0, 3, 1, None]


def test_smaller_ones_pass_until_they_have_had_as_many_pages(queue: Queue) -> None:
    large = queue.add(7)
    small = [queue.add(2) for _ in range(6)]
    assert [queue.next(6) for _ in range(3)] == small[:3]  # 6 pages; a fourth would make 8
    assert queue.next(6) is None
    assert queue.next(7) == large
    assert queue.next(6) == small[3]


def test_pages_are_kept_for_the_first_that_waited_long_enough_not_for_those_behind(
    queue: Queue,
) -> None:
    queue.add(10)
    queue.add(4)
    assert queue.next(3) is None
    queue.add(3)
    assert queue.next(3) == 2  # 3 of the 4 pages that it may take before the second one
    queue.add(1)
    queue.add(1)
    assert queue.next(3) == 3
    assert queue.next(3) is None  # the second one's pages are due
    assert queue.next(4) == 1
    queue.add(2)
    assert queue.next(4) == 4  # 3 + 1 + 4 + 1 of the 10 pages have passed the first one
    assert queue.next(4) is None
    assert queue.next(10) == 0


def test_no_pages_are_kept_while_parked_sequences_hold_too_many(queue: Queue) -> None:
    large = queue.add(10)
    small = [queue.add(3) for _ in range(6)]
    assert [queue.next(4, num_attainable=9) for _ in range(5)] == small[:5]
    assert queue.next(4, num_attainable=10) is None  # they have had more than its own by now
    assert queue.next(10) == large


def test_one_that_was_overtaken_by_four_caches_is_next_whatever_its_priority(queue: Queue) -> None:
    late = queue.add(1, priority=7)
    for number in range(AGED_CACHES):
        queue.add(CACHE_PAGES)
        queue.add(1, priority=1)
        assert queue.next(20) == 1 + 2 * number
    assert queue.next(20) == late
    assert queue.next(20) == 2


def test_aged_ones_of_a_lower_priority_that_came_later_do_not_pass(queue: Queue) -> None:
    late = queue.add(1, priority=7)
    early = [queue.add(CACHE_PAGES, priority=1) for _ in range(2)]
    for _ in range(AGED_CACHES):  # all three are overtaken by four caches
        newest = queue.add(CACHE_PAGES)
        assert queue.next(CACHE_PAGES) == newest
    assert [queue.next(CACHE_PAGES) for _ in range(3)] == [late, *early]


def test_one_that_left_counts_no_more(queue: Queue) -> None:
    queue.add(9)
    queue.add(2)
    first, second = queue.waiting
    assert (len(queue.waiting), queue.waiting.num_tokens) == (2, 11 * PAGE_SIZE)
    assert queue.next(1) is None
    for _ in range(2):  # a second time changes nothing
        queue.waiting.remove(first)
    assert (list(queue.waiting), queue.waiting.num_tokens) == ([second], 2 * PAGE_SIZE)
    assert queue.next(1) is None
    assert queue.next(2) == 1
    assert (len(queue.waiting), queue.waiting.num_tokens) == (0, 0)


def test_leaving_frees_those_behind_at_once(queue: Queue) -> None:
    queue.add(5)
    queue.add(3)
    queue.add(3)
    assert queue.next(4) == 1
    assert queue.next(4) is None  # kept for the first
    [first, _] = queue.waiting
    queue.waiting.remove(first)
    assert queue.next(4) == 2


STEPS = st.lists(
    st.tuples(
        st.integers(1, CACHE_PAGES), st.integers(-1, 1), st.integers(1, 4), st.sampled_from("abc")
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40)
@given(STEPS, st.booleans())
def test_whoever_comes_is_admitted_however_many_come_after(
    steps: list[tuple[int, int, int, str]], has_tenants: bool
) -> None:
    """Each sequence (pages, priority, steps that it runs) comes a step after the one before.

    One page at the lowest number comes in every step.
    """
    queue, running = Queue(), list[tuple[int, int]]()
    sizes: dict[int, tuple[int, int]] = {}
    left = set(range(0, 2 * len(steps), 2))
    passed = dict.fromkeys(left, 0)
    for step in range(1000):
        if step < len(steps):
            num_pages, priority, num_steps, tenant = steps[step]
            arrival = queue.add(num_pages, priority, tenant if has_tenants else "")
            sizes[arrival] = num_pages, num_steps
        if left:
            sizes[queue.add(1, -2, "d" if has_tenants else "")] = 1, 1
        running = [(pages, end) for pages, end in running if end > step]
        while True:
            num_free = CACHE_PAGES - sum(pages for pages, _ in running)
            admitted = queue.next(num_free)
            if admitted is None:
                break
            pages, num_steps = sizes[admitted]
            assert pages <= num_free
            running.append((pages, step + num_steps))
            left.discard(admitted)
            for other in left:
                if other < admitted:
                    passed[other] += pages
        if not left:
            break
    assert not left
    for pages in [] if has_tenants else passed.values():
        assert pages < (AGED_CACHES + 1) * CACHE_PAGES


def test_a_tenant_with_many_sequences_does_not_hold_up_a_quiet_one(queue: Queue) -> None:
    flood = [queue.add(4, tenant="flood") for _ in range(50)]
    assert [queue.next(20) for _ in range(3)] == flood[:3]
    quiet = [queue.add(2, tenant="quiet") for _ in range(3)]
    # A round is four pages of each: one of the flood's, two of the quiet tenant's.
    assert [queue.next(20) for _ in range(5)] == [flood[3], *quiet[:2], flood[4], quiet[2]]
    assert [queue.next(20) for _ in range(2)] == flood[5:7]
    late = queue.add(1, tenant="quiet")
    assert [queue.next(20) for _ in range(3)] == [flood[7], late, flood[8]]


def test_after_a_tenant_has_left_the_others_wait_as_they_came(queue: Queue) -> None:
    first = [queue.add(1, priority, "a") for priority in (2, 0, 1)]
    other = queue.add(4, tenant="b")
    assert [queue.next(20), queue.next(20)] == [first[1], other]
    last = queue.add(1, 1, "a")
    assert [queue.next(20) for _ in range(4)] == [first[2], last, first[0], None]


def test_a_tenant_cannot_be_passed_by_others_that_come_again_and_again(queue: Queue) -> None:
    large = queue.add(20, tenant="large")
    small = []
    for _ in range(5):  # which have had as many pages then
        small.append(queue.add(4, tenant="small"))
        assert queue.next(19) == small[-1]
        assert queue.next(19) is None
    queue.add(4, tenant="small")
    assert queue.next(19) is None
    assert queue.next(20) == large


def test_turns_of_tenants_age_nobody(queue: Queue) -> None:
    flood = [queue.add(4, tenant="flood") for _ in range(60)]
    quiet = [queue.add(4, tenant="quiet") for _ in range(60)]
    admitted = [queue.next(20) for _ in range(120)]
    assert admitted == [arrival for pair in zip(flood, quiet, strict=True) for arrival in pair]


def test_one_that_another_tenant_s_priority_passes_ages(queue: Queue) -> None:
    late = queue.add(1, 7, "a")
    admitted = []
    while late not in admitted:
        queue.add(CACHE_PAGES, 0, "b")
        admitted.append(queue.next(CACHE_PAGES))
        assert len(admitted) <= AGED_CACHES + 2
    assert len(admitted) > AGED_CACHES
