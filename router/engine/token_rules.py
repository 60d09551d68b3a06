"""The edits that a request's rules make to the logits of one of its choices, token by token.

The edits depend only on the choice's own tokens, so a choice that resumes elsewhere from its tokens
gets the same edits.

Dimension letters: E tokens whose logits are edited.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from router.messages.request import GenerationRequest
from router.messages.rules import TokenRules


class Edits(NamedTuple):
    """The edits of a row of logits: add ``before``, scale the sum, add ``after``.

    A sum above 0 is divided by ``scale``, any other multiplied by it. A ``before`` of minus
    infinity forbids a token.
    """

    token_ids: np.ndarray
    """int64 [E], each once."""
    params: np.ndarray
    """fp32 [3, E]: before, scale, after."""


def rules_of(request: GenerationRequest, eos_token_ids: Iterable[int]) -> ChoiceRules | None:
    """Return the rules of one choice of a request, ``None`` for a request without any."""
    sampling = request.sampling
    if sampling.rules is None:
        return None
    ends = sorted(sampling.ends(eos_token_ids))
    return ChoiceRules(sampling.rules, request.prompt_token_ids, ends)


class ChoiceRules:
    """The rules of a request for one of its choices; keeps count of the choice's tokens."""

    def __init__(self, rules: TokenRules, prompt: Sequence[int], ends: Sequence[int]) -> None:
        """``ends`` are all tokens that end the choice."""
        self._rules = rules
        scaled = sorted(set(prompt)) if rules.repetition_penalty != 1.0 else []
        self._prompt = {token_id: place for place, token_id in enumerate(scaled)}
        self._prompt_ids = np.array(scaled, np.int64)
        self._bias = dict(rules.logit_bias)
        self._ends = ends
        self._counts: Counter[int] = Counter()
        self._num_counted = 0

    def edits(self, generated: Sequence[int]) -> Edits:
        """Return the edits for the token after ``generated``, the choice's tokens so far.

        They only grow from call to call.
        """
        self._counts.update(islice(generated, self._num_counted, None))
        self._num_counted = len(generated)
        before = {**self._bias, **dict.fromkeys(self._forbidden(generated), -math.inf)}
        rules, counts = self._rules, self._counts
        has_penalty = bool(rules.frequency_penalty or rules.presence_penalty)
        is_scaled = rules.repetition_penalty != 1.0
        others = dict.fromkeys([*before, *(counts if has_penalty or is_scaled else ())])
        params = np.zeros((3, len(others)), np.float32)
        params[0] = [before.get(token_id, 0.0) for token_id in others]
        params[1] = [
            rules.repetition_penalty
            if is_scaled and (token_id in self._prompt or token_id in counts)
            else 1.0
            for token_id in others
        ]
        if has_penalty:
            params[2] = [self._penalty(counts[token_id]) for token_id in others]
        return self._with_prompt(list(others), params)

    def _with_prompt(self, token_ids: list[int], params: np.ndarray) -> Edits:
        """Return these edits plus those of the prompt's other tokens, which may be many."""
        ids = np.array(token_ids, np.int64)
        if not self._prompt:
            return Edits(ids, params)
        is_left = np.ones(len(self._prompt), np.bool_)
        is_left[[self._prompt[i] for i in token_ids if i in self._prompt]] = False
        left = self._prompt_ids[is_left]
        scaled = np.zeros((3, len(left)), np.float32)
        scaled[1] = self._rules.repetition_penalty
        return Edits(np.concatenate([ids, left]), np.concatenate([params, scaled], axis=1))

    def _penalty(self, count: int) -> float:
        """Return what a token's count adds to its logit."""
        if not count:
            return 0.0
        return -(self._rules.frequency_penalty * count + self._rules.presence_penalty)

    def _forbidden(self, generated: Sequence[int]) -> Iterator[int]:
        """Yield the tokens that may not come next."""
        if len(generated) < self._rules.min_tokens:
            yield from self._ends
        for word in self._rules.bad_words:
            *head, last = word
            if not head or list(generated[-len(head) :]) == head:
                yield last
