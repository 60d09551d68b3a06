"""What a request wants of single tokens, as plain data that msgpack can carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Rules for single tokens; ``router/gateway/input/tokens.py`` has checked them.

    ``frequency_penalty`` is taken from a token's logit once for each time that the choice has it,
    ``presence_penalty`` once if the choice has it at all (OpenAI's API). ``repetition_penalty``
    divides a positive logit of a token that the prompt or the choice has, and multiplies a negative
    one (Keskar et al. 2019, section 4.1); 1 is off. ``logit_bias`` has pairs of a token and what is
    added to its logit. The first ``min_tokens`` tokens of a choice are no end. A choice ends after
    one of ``stop_token_ids``. None of ``bad_words``, each a sequence of tokens, is ever completed.
    """

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def to_wire(self) -> list[Any]:
        """Return the rules as a msgpack-able list."""
        return [getattr(self, name) for name in self.__slots__]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> TokenRules:
        """Rebuild rules from :meth:`to_wire`."""
        frequency, presence, repetition, bias, min_tokens, stop_token_ids, bad_words = wire
        return cls(
            frequency,
            presence,
            repetition,
            tuple((token_id, amount) for token_id, amount in bias),
            min_tokens,
            tuple(stop_token_ids),
            tuple(map(tuple, bad_words)),
        )


NO_RULES = TokenRules()
