"""The tokens that a grammar's matcher (llguidance) allows next, as bits.

Dimension letters: G choices, V vocabulary size, W words of 32 bits with a bit for each token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer


class Vocabulary(NamedTuple):
    """A model's tokens, as grammars need them."""

    tokens: LLTokenizer
    num_words: int
    """W, as matchers have it."""
    may_come: tuple[bytes, bytes]
    """A bit for each token of the model except special ones, which have no text. The second adds
    the end tokens, for a text that may end; earlier, an end token would stand for its name."""


class Mask(NamedTuple):
    """The tokens that may come next in a choice: the intersection of both sides."""

    by_grammar: bytes
    """A bit for each token, as :meth:`LLMatcher.compute_bitmask` returns them."""
    may_come: bytes
    """A bit for each token that may come in any grammar."""


def vocabulary_of(tokens: LLTokenizer, vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a model with ``vocab_size`` tokens."""
    num_words = len(LLMatcher(tokens, 'start: "a"').compute_bitmask()) // 4
    ends = set(tokens.eos_tokens)
    special = set(filter(tokens.is_special_token, range(tokens.vocab_size)))
    model = set(range(vocab_size))
    before, at_end = model - special - ends, model - (special - ends)
    return Vocabulary(tokens, num_words, (bits_of(before, num_words), bits_of(at_end, num_words)))


def bits_of(token_ids: Collection[int], num_words: int) -> bytes:
    """Return a bit for each token, set for ``token_ids``."""
    flags = np.zeros(num_words * 32, np.bool_)
    flags[list(token_ids)] = True
    return np.packbits(flags, bitorder="little").tobytes()


def with_bits(mask: bytes, more: bytes) -> bytes:
    """Return the union of two masks."""
    return (np.frombuffer(mask, np.uint8) | np.frombuffer(more, np.uint8)).tobytes()


def words_of(masks: Sequence[Mask]) -> np.ndarray:
    """Return a bit for each token that may come next, int32 [G, W]."""
    by_grammar, may_come = (
        np.frombuffer(b"".join(side), np.int32) for side in zip(*masks, strict=True)
    )
    return (by_grammar & may_come).reshape(len(masks), -1)


def flags_of(mask: Mask, vocab_size: int) -> np.ndarray:
    """Return the bits of a mask as flags, bool [V]."""
    words = words_of([mask]).view(np.uint8)
    [flags] = np.unpackbits(words, axis=-1, count=vocab_size, bitorder="little")
    return flags.view(np.bool_)
