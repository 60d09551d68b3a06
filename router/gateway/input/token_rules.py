"""The check of a request's rules for single tokens against a model: token ids come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from cluster.errors import InvalidRequestError
from router.gateway.input import checks
from router.gateway.input.models import GatewayModel
from router.gateway.input.prompts import check_ids
from router.gateway.input.request.model import Generation
from router.messages.rules import NO_RULES, TokenRules

RULES = frozenset(field.name for field in fields(TokenRules))
"""The fields of a request that are such rules."""


def check_rules(asked: Generation, model: GatewayModel, max_tokens: int) -> TokenRules | None:
    """Return the rules that a client asks for, ``None`` if they change nothing.

    Raises :class:`InvalidRequestError`.
    """
    vocab_size = model.info.vocab_size
    if asked.min_tokens > max_tokens:
        allowed = f"an integer from 0 to {max_tokens}"
        raise InvalidRequestError(checks.wrong(asked.min_tokens, allowed), "min_tokens")
    biases = asked.logit_bias or {}
    for token_id in biases:
        checks.integer(token_id, "logit_bias", 0, vocab_size - 1)
    stop_ids = check_ids(asked.stop_token_ids or (), vocab_size, "stop_token_ids")
    own = {
        "logit_bias": tuple(sorted((token_id, by) for token_id, by in biases.items() if by)),
        "stop_token_ids": tuple(sorted(set(stop_ids))),
        "bad_words": _check_bad_words(asked.bad_words or (), model),
    }
    rules = TokenRules(**(asked.shared(TokenRules) | own))
    _check_room(rules, model)
    return None if rules == NO_RULES else rules


def _check_bad_words(words: Sequence[str], model: GatewayModel) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, as it is within a word and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for place, word in enumerate(words):
        path = f"bad_words[{place}]"
        bare = word.strip()
        if not bare:
            raise InvalidRequestError(checks.wrong(word, "a word, not only white space"), path)
        for text in (bare, f" {bare}"):
            ids = tuple(model.tokenizer.encode(text, add_special_tokens=False, where=path))
            if not ids or max(ids) >= model.info.vocab_size:
                raise InvalidRequestError("does not encode to tokens of this model", path)
            found[ids] = None
    return tuple(found)


def _check_room(rules: TokenRules, model: GatewayModel) -> None:
    """Refuse rules that could forbid every token of the vocabulary at one place."""
    forbidden = {word[-1] for word in rules.bad_words}
    if rules.min_tokens:
        forbidden |= {*rules.stop_token_ids, *model.info.eos_token_ids}
    if len(forbidden) >= model.info.vocab_size:
        raise InvalidRequestError("could forbid every token in the vocabulary", "bad_words")
