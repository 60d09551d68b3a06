"""Forms are what their rules say, and choices that have advanced apart are resumed apart."""

from __future__ import annotations

import pytest

from tests.world.choices import look_at_pages
from tests.world.forms import BIASED, FORMS, LETTERS, PENALTY, logit_of, picked, vocabulary
from tests.world.model import VOCAB, tokens_of
from tests.world.weather import Scenario, draw
from tests.world.world import World, run


def test_head_prefers_the_tokens_after_the_first() -> None:
    assert [logit_of(510, token, VOCAB) for token in (510, 511, 0)] == [1.0, 31 / 32, 30 / 32]
    assert logit_of(0, 32, VOCAB) == 0.0


def test_grammar_takes_letters_of_both_halves_in_turn() -> None:
    for first in (0, 12, 13, 25, 511):
        even = picked("grammar", first, (1,), [], VOCAB)
        odd = picked("grammar", first, (1,), [even], VOCAB)
        assert even % LETTERS < LETTERS // 2 <= odd % LETTERS
    assert picked("grammar", 14, (1,), [0], VOCAB) == 14


def test_penalty_wears_a_biased_token_out() -> None:
    first = 300  # its logit is 1, that of the biased ones 2
    assert BIASED == 2.0
    answer: list[int] = []
    for _ in range(10):
        answer.append(picked("penalties", first, (7,), answer, VOCAB))
    # 2, then 2 - 0.375 a time: three of each above 1, in turn; then the first is as high
    assert PENALTY == 0.375
    assert sorted(answer[:9]) == [7, 7, 7, 8, 8, 8, 9, 9, 9]
    assert answer[9] == first


def test_vocabulary_has_a_letter_for_each_token_and_an_end() -> None:
    made = vocabulary(VOCAB)
    assert made.vocab_size == VOCAB + 1
    assert made.decode_bytes([0, 27, 25]) == b"abz"


@pytest.fixture(scope="module")
def begun() -> Scenario:
    """A world whose clients have tokens of some choices, in every form."""
    found = (draw(seed) for seed in range(200))
    return next(one for one in found if any(plan.received for plan in one.plans))


def test_choices_are_resumed_apart_in_every_form(begun: Scenario) -> None:
    outcome = run(begun)
    assert outcome.breaches == []
    assert {answer.plan.form for answer in outcome.answers if not answer.error} == set(FORMS)
    resumed = [a for a in outcome.answers if len(set(a.plan.received)) > 1 and not a.error]
    assert resumed
    for answer in (one for one in resumed if not one.plan.is_inexact):
        right = tokens_of("a", answer.plan.prompt, answer.plan.max_tokens, answer.plan.form)
        assert [tuple(choice.token_ids) for choice in answer.choices] == [right] * answer.plan.n


def test_page_that_mixed_kernels_share_breaks_the_law() -> None:
    world = World(0)
    try:
        world.deploy("a")
        world.run(3.0)
        router = world.serve.deployments["router"].running()[0].handle.instance
        router._scheduler.prefixes.hit_tokens = 4
        look_at_pages(world)
        assert world.law.breaches == []
        world.setting = type(world.setting)(mixed=True)
        look_at_pages(world)
        assert [breach.law for breach in world.law.breaches] == ["mixed kernels share no pages"]
    finally:
        world.close()
