"""Requests of all kinds go on from any part of their answers with the bits they would have had.

Drawn at random: grammars, rules, choices, log probabilities, experts of tokens, and how many
tokens have come. Each answer is compared with that of the same request without a failure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router.engine.constraints import Grammars
from router.engine.scheduling.scheduler import Limits
from router.gateway.input.tokenizer import Tokenizer
from router.messages.request import GenerationRequest, Received, TokenEvent
from router.messages.routed import RoutedExperts
from router.messages.rules import TokenRules
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_constraints import PERSON, of_schema
from tests.unit.router.engine.test_engine import prompt_of

ROUNDS = 60
LIMITS = [Limits(4, 1, 64), Limits(4, 3, 64), Limits(8, 64, 64), Limits(1, 16, 64)]


def drawn(source: random.Random, name: str, routed: RoutedExperts) -> GenerationRequest:
    options: dict[str, Any] = {
        "temperature": source.choice([0.0, 1.0]),
        "seed": source.randrange(99),
        "n": source.randint(1, 2),
        "logprobs": source.choice([None, 1]),
        "prompt_logprobs": source.choice([None, 0]),
    }
    kind = source.choice(["plain", "rules", "grammar"])
    if kind == "grammar":
        options |= {"grammar": of_schema(PERSON), "ignore_eos": False}
    elif kind == "rules":
        options["rules"] = TokenRules(
            frequency_penalty=0.3,
            presence_penalty=0.2,
            repetition_penalty=1.2,
            min_tokens=source.randint(0, 5),
            bad_words=((7, 9), (5,)),
            stop_token_ids=(3,),
        )
    prompt = prompt_of(source.randint(1, 40), source.randrange(5))
    request = greedy_request(name, prompt, source.randint(6, 40), **options)
    return replace(request, routed=routed) if source.random() < 0.4 else request


def check(
    request: GenerationRequest, whole: TokenEvent, rest: TokenEvent, received: Sequence[int]
) -> None:
    count = len(received)
    assert (rest.token_ids, rest.start) == (whole.token_ids[count:], count)
    assert rest.logprobs == whole.logprobs[count:]
    assert (rest.finish_reason, rest.exact) == (whole.finish_reason, True)
    assert rest.prompt_logprobs == (() if count else whole.prompt_logprobs)
    if request.routed is not None:
        had = (len(request.prompt_token_ids) + count - 1) * request.routed.row_bytes if count else 0
        assert rest.routed == whole.routed[had:]


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_any_request_goes_on_from_any_token(
    tmp_path: Path, limits: Limits, prefix_cache: bool
) -> None:
    save_mixtral(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path), (0,))
    grammars = Grammars(lambda: tokenizer.vocabulary(VOCAB_SIZE, (0,)), VOCAB_SIZE)
    cluster = LocalCluster(tmp_path, limits=limits, grammars=grammars, prefix_cache=prefix_cache)
    shape = cluster.checkpoint.shape
    asked = len(shape.layers), shape.num_experts_per_tok
    routed = RoutedExperts(asked, shape.num_experts, True)
    source = random.Random(f"{limits} {prefix_cache}")
    num_received = 0
    for number in range(ROUNDS):
        names = [f"{number}.{i}" for i in range(source.randint(1, 3))]
        requests = [drawn(source, name, routed) for name in names]
        wholes = [cluster.generate(request)[0] for request in requests]
        parts = [
            [whole.token_ids[: source.randint(0, len(whole.token_ids))] for whole in choices]
            for choices in wholes
        ]
        again = [
            replace(r, request_id=f"{r.request_id} again", received=tuple(map(Received, own)))
            for r, own in zip(requests, parts, strict=True)
        ]
        rests = cluster.generate(*again)
        for request, choices, own, found in zip(requests, wholes, parts, rests, strict=True):
            for whole, received, rest in zip(choices, own, found, strict=True):
                check(request, whole, rest, received)
                num_received += len(received)
        assert cluster.scheduler.num_free_pages == cluster.scheduler.num_pages
    assert num_received > 5 * ROUNDS
    assert set(cluster.engine.replayed) == {"equal"}
    cluster.close()
    grammars.close()
