"""The check of a request's rules for single tokens: the client's values in, token ids out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from cluster.errors import InvalidRequestError
from router.gateway import checks
from router.gateway.models import GatewayModel
from router.gateway.prompts import check_ids
from router.messages.rules import NO_RULES, TokenRules

RULE_FIELDS = (
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "min_tokens",
    "stop_token_ids", "bad_words",
)  # fmt: skip
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_STOP_IDS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
LEAST_SCALE = 0.01
"""The least repetition penalty: with one near 0, products of logits are infinite."""
_ID = re.compile("0|[1-9][0-9]{0,9}")


def check_rules(
    given: Mapping[str, object],
    path: Callable[[str], str],
    model: GatewayModel,
    max_tokens: int,
) -> TokenRules | None:
    """Return the rules among a client's sampling fields, ``None`` where they change nothing.

    ``path`` gives the client's name of a field. Raises :class:`InvalidRequestError`.
    """
    if not any(name in given for name in RULE_FIELDS):
        return None
    vocab_size = model.info.vocab_size

    def penalty(name: str) -> float:
        return checks.number(given.get(name, 0.0), path(name), -MAX_PENALTY, MAX_PENALTY)

    rules = TokenRules(
        frequency_penalty=penalty("frequency_penalty"),
        presence_penalty=penalty("presence_penalty"),
        repetition_penalty=checks.number(
            given.get("repetition_penalty", 1.0),
            path("repetition_penalty"),
            LEAST_SCALE,
            MAX_PENALTY,
        ),
        logit_bias=_check_bias(given.get("logit_bias", {}), path("logit_bias"), vocab_size),
        min_tokens=checks.integer(given.get("min_tokens", 0), path("min_tokens"), 0, max_tokens),
        stop_token_ids=_check_stop_ids(
            given.get("stop_token_ids", ()), path("stop_token_ids"), vocab_size
        ),
        bad_words=_check_bad_words(given.get("bad_words", ()), path("bad_words"), model),
    )
    _check_room(rules, model, path)
    return None if rules == NO_RULES else rules


def _check_bias(given: object, where: str, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Return the biases in the order of their tokens; JSON's keys are texts, gRPC's are numbers."""
    if not isinstance(given, Mapping):
        raise InvalidRequestError(checks.wrong(given, "a mapping of token ids to numbers"), where)
    if len(given) > MAX_BIASES:
        raise InvalidRequestError(f"has {len(given)} tokens; at most {MAX_BIASES}", where)
    found: dict[int, float] = {}
    for key, amount in given.items():
        number = int(key) if isinstance(key, str) and _ID.fullmatch(key) else key
        token_id = checks.integer(number, where, 0, vocab_size - 1)
        found[token_id] = checks.number(amount, f"{where}.{token_id}", -MAX_BIAS, MAX_BIAS)
    return tuple(sorted((token_id, amount) for token_id, amount in found.items() if amount))


def _check_stop_ids(given: object, where: str, vocab_size: int) -> tuple[int, ...]:
    _check_list(given, where, MAX_STOP_IDS, "a list of token ids")
    return tuple(sorted(set(check_ids(given, vocab_size, where))))


def _check_bad_words(given: object, where: str, model: GatewayModel) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, as it is within a word and after a space."""
    words = _check_list(given, where, MAX_BAD_WORDS, "a list of texts")
    found: dict[tuple[int, ...], None] = {}
    for place, word in enumerate(words):
        path = f"{where}[{place}]"
        if len(checks.text(word, path)) > MAX_BAD_WORD_CHARS or not str(word).strip():
            allowed = f"a word of 1 to {MAX_BAD_WORD_CHARS} characters"
            raise InvalidRequestError(checks.wrong(word, allowed), path)
        bare = str(word).strip()
        for text in (bare, f" {bare}"):
            ids = tuple(model.tokenizer.encode(text, add_special_tokens=False, where=path))
            if not ids or max(ids) >= model.info.vocab_size:
                raise InvalidRequestError("has no tokens of the model", path)
            found[ids] = None
    return tuple(found)


def _check_list(given: object, where: str, most: int, allowed: str) -> Sequence[object]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidRequestError(checks.wrong(given, allowed), where)
    if len(given) > most:
        raise InvalidRequestError(f"has {len(given)} entries; at most {most}", where)
    return given


def _check_room(rules: TokenRules, model: GatewayModel, path: Callable[[str], str]) -> None:
    """Refuse rules that could forbid every token of the vocabulary at one place."""
    forbidden = {word[-1] for word in rules.bad_words}
    if rules.min_tokens:
        forbidden |= {*rules.stop_token_ids, *model.info.eos_token_ids}
    if len(forbidden) >= model.info.vocab_size:
        raise InvalidRequestError("leaves no token of the vocabulary", path("bad_words"))
