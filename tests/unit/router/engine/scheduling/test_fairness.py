"""A prompt of 64 chunks beside eight short requests: when first tokens come, in computed tokens."""

from __future__ import annotations

import pytest

from router.engine.scheduling.scheduler import Limits, Scheduler
from router.messages.request import GenerationRequest
from tests.unit.router.engine.scheduling.test_scheduler import advance, request_of

CHUNK = 16
LONG = request_of("long", 64 * CHUNK, 2)
SHORT = [request_of(f"s{i}", CHUNK, 4) for i in range(8)]


class Run:
    """The steps of a scheduler, and after how many computed tokens each request had its first."""

    def __init__(self, *requests: GenerationRequest) -> None:
        self.scheduler = Scheduler(Limits(32, CHUNK, 16), 512, 16, even_context=4 * CHUNK)
        self.tokens = 0
        self.first_token_at: dict[str, int] = {}
        self.add(*requests)

    def add(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> None:
        works = self.scheduler.schedule()
        self.tokens += sum(work.end - work.start for work in works)
        for sequence in advance(self.scheduler, works):
            self.first_token_at.setdefault(sequence.request.request_id, self.tokens)

    @property
    def long_left(self) -> int:
        """The tokens of the long prompt that are not computed, while it runs."""
        [long] = [s for s in self.scheduler.running if s.request.request_id == "long"]
        return len(long.token_ids) - long.num_computed

    def to_the_end(self) -> Run:
        while self.scheduler.sequences():
            self.step()
        return self


@pytest.mark.parametrize("steps_before", [0, 1, 30])
def test_first_tokens_beside_a_long_prompt_come_after_twice_as_many_tokens_at_most(
    steps_before: int,
) -> None:
    short_alone, long_alone = Run(*SHORT).to_the_end(), Run(LONG).to_the_end()
    beside = Run(LONG)
    for _ in range(steps_before):
        beside.step()
    before = beside.tokens
    beside.add(*SHORT)
    beside.to_the_end()
    for request in SHORT:
        waited = beside.first_token_at[request.request_id] - before
        assert waited <= 2 * short_alone.first_token_at[request.request_id]
    # The long prompt loses no more than the tokens of the others.
    assert beside.first_token_at["long"] <= long_alone.tokens + short_alone.tokens


def test_a_long_prompt_goes_on_while_short_ones_take_all_that_it_does_not_keep() -> None:
    run, part = Run(request_of("long", 9 * CHUNK, 1)), CHUNK // 4
    run.step()
    for number in range(2 * 9 * CHUNK):  # it has a token of every second step at least
        run.add(request_of(f"n{number}", CHUNK - part, 1))
        run.step()
        if "long" in run.first_token_at:
            break
        is_shortest = run.long_left < CHUNK
        assert is_shortest or f"n{number}" in run.first_token_at
    assert "long" in run.first_token_at
    # A part of every second step is four tokens at first, then fewer, which cost as much.
    assert number > 2 * 8 * 4
