"""A prompt of 64 chunks beside eight short requests: their first tokens, and everyone's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.engine.scheduling.scheduler import Limits
from router.messages.request import GenerationRequest
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

CHUNK = 16
LONG = greedy_request("long", prompt_of(64 * CHUNK, 99), 2)
SHORT = [greedy_request(f"s{i}", prompt_of(CHUNK, i), 4) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path, max_position_embeddings=2048, num_hidden_layers=1)
    return path


class Run:
    """The steps of an engine, and after how many computed tokens each request had its first."""

    def __init__(self, folder: Path) -> None:
        self.cluster = LocalCluster(folder, limits=Limits(32, CHUNK, 16), threaded=False)
        self.tokens = 0
        self.first_token_at: dict[str, int] = {}
        self.generated: dict[str, list[int]] = {}

    def add(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.cluster.scheduler.add(request)

    def step(self) -> None:
        scheduler = self.cluster.scheduler
        works = scheduler.schedule()
        self.cluster.engine.step(works)
        self.tokens += sum(work.end - work.start for work in works)
        for work in works:
            sequence = work.sequence
            generated = sequence.token_ids[len(sequence.request.prompt_token_ids) :]
            if generated:
                self.first_token_at.setdefault(sequence.request.request_id, self.tokens)
                self.generated[sequence.request.request_id] = generated

    @property
    def long_left(self) -> int:
        """The tokens of the long prompt that are not computed, while it runs."""
        running = self.cluster.scheduler.running
        [long] = [s for s in running if s.request.request_id == "long"]
        return len(long.token_ids) - long.num_computed

    def to_the_end(self) -> None:
        while self.cluster.scheduler.sequences():
            self.step()


def alone(folder: Path, *requests: GenerationRequest) -> Run:
    run = Run(folder)
    run.add(*requests)
    run.to_the_end()
    return run


@pytest.fixture(scope="module")
def short_alone(folder: Path) -> Run:
    return alone(folder, *SHORT)


@pytest.fixture(scope="module")
def long_alone(folder: Path) -> Run:
    return alone(folder, LONG)


@pytest.mark.parametrize("steps_before", [0, 1, 30])
def test_first_tokens_beside_a_long_prompt_come_after_twice_as_many_tokens_at_most(
    folder: Path, short_alone: Run, long_alone: Run, steps_before: int
) -> None:
    beside = Run(folder)
    beside.add(LONG)
    for _ in range(steps_before):
        beside.step()
    before = beside.tokens
    beside.add(*SHORT)
    beside.to_the_end()
    for request in SHORT:
        waited = beside.first_token_at[request.request_id] - before
        assert waited <= 2 * short_alone.first_token_at[request.request_id]
        assert beside.generated[request.request_id] == short_alone.generated[request.request_id]
    assert beside.generated["long"] == long_alone.generated["long"]
    # The long prompt loses no more than the tokens of the others.
    assert beside.first_token_at["long"] <= long_alone.tokens + short_alone.tokens


def test_a_long_prompt_goes_on_while_short_ones_take_all_that_it_does_not_keep(
    folder: Path,
) -> None:
    run, part = Run(folder), CHUNK // 4
    run.add(greedy_request("long", prompt_of(9 * CHUNK, 99), 1))
    run.step()
    for number in range(2 * 9 * CHUNK):  # it has a token of every second step at least
        run.add(greedy_request(f"n{number}", prompt_of(CHUNK - part, number), 1))
        run.step()
        if "long" in run.first_token_at:
            break
        is_shortest = run.long_left < CHUNK
        assert is_shortest or f"n{number}" in run.first_token_at
    assert "long" in run.first_token_at
    # A part of every second step is four tokens at first, then fewer, which cost as much.
    assert number > 2 * 8 * 4
