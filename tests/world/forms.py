"""The forms that an answer may have in a world: grammars and penalties, and a slow oracle of both.

The head's logits fall from the token of a state upwards, so that each rule has a next best token.
A token's text is one letter. The grammar wants letters of the two halves of the alphabet in turn,
so that a matcher that lost or repeated a token shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper

from router.messages.request import SamplingParams
from router.messages.rules import TokenRules

LETTERS = 26
FALLING = 32
"""How many tokens have a logit above 0; in binary all are exact."""
GRAMMAR = "start: /([a-m][n-z])*/"
BIASED = 2.0
"""What is added to the logits of some tokens, so that they come again and again."""
PENALTY, NUM_BIASED = 0.375, 3
FORMS = ("", "grammar", "penalties", "grammar and penalties")


def logit_of(first: int, token_id: int, vocab_size: int) -> float:
    """Return a token's logit where ``first`` has the highest."""
    return max(0.0, 1.0 - (token_id - first) % vocab_size / FALLING)


def sampling_of(form: str, max_tokens: int, n: int, prompt: Sequence[int]) -> SamplingParams:
    """Return the parameters of a greedy request of a form."""
    rules = None
    if "penalties" in form:
        bias = tuple((token_id, BIASED) for token_id in _biased(prompt))
        rules = TokenRules(frequency_penalty=PENALTY, logit_bias=bias)
    grammar = GRAMMAR if "grammar" in form else ""
    return SamplingParams(max_tokens, temperature=0.0, n=n, rules=rules, grammar=grammar)


def picked(
    form: str, first: int, prompt: Sequence[int], before: Sequence[int], vocab_size: int
) -> int:
    """Return the token that follows ``before`` in an answer where the head says ``first``."""
    if not form:
        return first
    biased: Collection[int] = _biased(prompt) if "penalties" in form else ()

    def logit(token_id: int) -> float:
        penalty = PENALTY * before.count(token_id) if "penalties" in form else 0.0
        return logit_of(first, token_id, vocab_size) + BIASED * (token_id in biased) - penalty

    allowed = range(vocab_size)
    if "grammar" in form:
        half = len(before) % 2
        found = [t for t in allowed if t % LETTERS // (LETTERS // 2) == half]
        return max(found, key=logit)
    return max(allowed, key=logit)


def _biased(prompt: Sequence[int]) -> list[int]:
    return list(range(sum(prompt) % 256, sum(prompt) % 256 + NUM_BIASED))


@cache
def vocabulary(vocab_size: int) -> LLTokenizer:
    """Return the vocabulary of a world's routers; its end has an id of its own."""
    return LLTokenizer(TokenizerWrapper(_Letters(vocab_size)))


class _Letters:
    """A tokenizer as llguidance reads it."""

    bos_token_id = None

    def __init__(self, vocab_size: int) -> None:
        self.eos_token_id = vocab_size
        self.special_token_ids = [vocab_size]
        self.tokens = [bytes([97 + i % LETTERS]) for i in range(vocab_size)] + [b"<end>"]

    def __call__(self, text: Any) -> list[int]:
        return [max(0, letter - 97) for letter in bytes(text, "utf-8")]
