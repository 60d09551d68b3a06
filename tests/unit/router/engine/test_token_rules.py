"""Rules for single tokens against transformers' processors, and whole answers against its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MixtralForCausalLM,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from router.engine.batch import sampling_of
from router.engine.sampling import Draw, read, sample
from router.engine.token_rules import ChoiceRules, Edits
from router.messages.request import SamplingParams
from router.messages.rules import TokenRules
from tests.checkpoints import VOCAB_SIZE
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

VOCAB, EOS = 12, 3
LENGTH = 16
PROMPT = prompt_of(10, 7)


def edited(
    logits: torch.Tensor, rules: TokenRules, prompt: Sequence[int], generated: Sequence[int]
) -> torch.Tensor:
    """Return a row of logits with the edits that the rules make to it."""
    edits = ChoiceRules(rules, prompt, [EOS, *rules.stop_token_ids]).edits(generated)
    row = logits.clone()
    for token_id, (before, scale, after) in zip(
        edits.token_ids.tolist(), edits.params.T.tolist(), strict=True
    ):
        total = row[token_id] + before
        row[token_id] = (total / scale if total > 0 else total * scale) + after
    return row


def expected(
    logits: torch.Tensor, rules: TokenRules, prompt: Sequence[int], generated: Sequence[int]
) -> torch.Tensor:
    """Return the same by transformers' processors, and by OpenAI's formula of the penalties."""
    all_ids = torch.tensor([[*prompt, *generated]])
    own_ids = torch.tensor([list(generated)], dtype=torch.int64)
    ends = [EOS, *rules.stop_token_ids]
    scores = logits[None].clone()
    if rules.bad_words:
        words = [list(word) for word in rules.bad_words]
        scores = NoBadWordsLogitsProcessor(words, eos_token_id=[-1])(own_ids, scores)
    if rules.min_tokens:
        least = MinNewTokensLengthLogitsProcessor(len(prompt), rules.min_tokens, ends)
        scores = least(all_ids, scores)
    if rules.logit_bias:
        bias = {(token_id,): amount for token_id, amount in rules.logit_bias}
        scores = SequenceBiasLogitsProcessor(bias)(all_ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)(all_ids, scores)
    for token_id in set(generated):
        count = list(generated).count(token_id)
        scores[0, token_id] -= count * rules.frequency_penalty + rules.presence_penalty
    return scores[0]


RULES = {
    "none": TokenRules(),
    "frequency": TokenRules(frequency_penalty=0.75),
    "presence": TokenRules(presence_penalty=-1.5),
    "repetition": TokenRules(repetition_penalty=1.3),
    "encouraged repetition": TokenRules(repetition_penalty=0.5),
    "bias": TokenRules(logit_bias=((0, -100.0), (5, 2.5))),
    "least": TokenRules(min_tokens=4, stop_token_ids=(1,)),
    "bad words": TokenRules(bad_words=((2,), (4, 5), (6, 6, 7))),
    "all": TokenRules(0.5, 0.25, 1.2, ((5, 3.0), (7, -2.0)), 3, (1, 2), ((4, 5), (8,))),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_edits_are_those_of_transformers_processors(name: str, length: int) -> None:
    source = random.Random(f"{name}{length}")
    for _ in range(20):
        torch.manual_seed(source.randrange(2**31))
        logits = 3 * torch.randn(VOCAB)
        prompt = [source.randrange(VOCAB) for _ in range(source.randint(1, 6))]
        generated = [source.randrange(VOCAB) for _ in range(length)]
        torch.testing.assert_close(
            edited(logits, RULES[name], prompt, generated),
            expected(logits, RULES[name], prompt, generated),
        )


def test_counts_go_on_from_call_to_call_and_a_repeated_call_changes_nothing() -> None:
    rules = ChoiceRules(RULES["all"], [9], [EOS])
    generated: list[int] = []
    for token_id in [4, 4, 5, 9, 4]:
        generated.append(token_id)
        once, twice = rules.edits(generated), rules.edits(generated)
        fresh = ChoiceRules(RULES["all"], [9], [EOS]).edits(generated)
        for edits in (once, twice):
            assert by_token(edits) == by_token(fresh)


def by_token(edits: Edits) -> dict[int, list[float]]:
    return dict(zip(edits.token_ids.tolist(), edits.params.T.tolist(), strict=True))


def test_a_row_is_edited_alike_beside_mates_and_its_log_probabilities_are_of_the_model() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, VOCAB)
    params = SamplingParams(max_tokens=9, temperature=0.0, logprobs=2)
    edits = ChoiceRules(RULES["bad words"], [1], [EOS]).edits([4])
    draws = [Draw(params, 0, 5), Draw(params, 0, 5, edits), Draw(params, 0, 5)]
    made = sampling_of(draws)
    together = read(sample(logits, made.tensors, made.logprob_sizes), made)
    [row] = [
        read(sample(logits[1:2], m.tensors, m.logprob_sizes), m) for m in [sampling_of([draws[1]])]
    ]
    assert (together.token_ids[1], together.logprobs[1]) == (row.token_ids[0], row.logprobs[0])
    assert together.token_ids[0] == int(logits[0].argmax())
    assert together.token_ids[1] == int(edited(logits[1], RULES["bad words"], [1], [4]).argmax())
    [of_model] = [row for row in together.logprobs[1:2] if row is not None]
    assert of_model.top_ids == tuple(logits[1].topk(2).indices.tolist())


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[LocalCluster]:
    made = LocalCluster(folder)
    yield made
    made.close()


def transformers_answer(oracle: MixtralForCausalLM, **settings: Any) -> tuple[int, ...]:
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": None, **settings}
    output = oracle.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tuple(output[0, len(PROMPT) :].tolist())


def tokens_of(
    cluster: LocalCluster, name: str, rules: TokenRules, **sampling: Any
) -> tuple[int, ...]:
    [[event]] = cluster.generate(greedy_request(name, PROMPT, LENGTH, rules=rules, **sampling))
    return event.token_ids


def test_answers_are_those_of_transformers(
    cluster: LocalCluster, oracle: MixtralForCausalLM
) -> None:
    plain = tokens_of(cluster, "plain", TokenRules())
    assert plain == transformers_answer(oracle)
    bad = (plain[0],), (plain[2], plain[3])
    assert tokens_of(cluster, "bad", TokenRules(bad_words=bad)) == transformers_answer(
        oracle, bad_words_ids=[list(word) for word in bad]
    )
    liked = (plain[5], 4.0), ((plain[0] + 1) % VOCAB_SIZE, 1.5)
    assert tokens_of(cluster, "bias", TokenRules(logit_bias=liked)) == transformers_answer(
        oracle, sequence_bias={(token_id,): amount for token_id, amount in liked}
    )
    again = tokens_of(cluster, "again", TokenRules(logit_bias=((plain[0], 4.0),)))
    scaled = TokenRules(logit_bias=((plain[0], 4.0),), repetition_penalty=1.7)
    assert tokens_of(cluster, "scaled", scaled) == transformers_answer(
        oracle, sequence_bias={(plain[0],): 4.0}, repetition_penalty=1.7
    )
    assert len({plain, again, tokens_of(cluster, "scaled twice", scaled)}) == 3


def test_a_choice_ends_after_a_stop_token_and_not_before_its_least_number(
    cluster: LocalCluster,
) -> None:
    plain = tokens_of(cluster, "whole", TokenRules())
    stop = plain[4]
    [[event]] = cluster.generate(
        greedy_request("stops", PROMPT, LENGTH, rules=TokenRules(stop_token_ids=(stop,)))
    )
    first = plain.index(stop)
    assert (event.token_ids, event.finish_reason) == (plain[: first + 1], "stop")
    later = tokens_of(cluster, "later", TokenRules(stop_token_ids=(stop,), min_tokens=12))
    assert stop not in later[:12]
    assert len(later) >= 12


def test_mates_with_and_without_rules_do_not_change_each_other(cluster: LocalCluster) -> None:
    names = [name for name in RULES if name != "none"]
    requests = [
        greedy_request(f"{name}{round_}", PROMPT, LENGTH, temperature=1.0, seed=round_, rules=rules)
        for round_ in range(2)
        for name, rules in (("plain", None), *((name, RULES[name]) for name in names))
    ]
    alone = [cluster.generate(replace(r, request_id=f"{r.request_id}-alone"))[0] for r in requests]
    assert cluster.generate(*requests) == alone
