"""A tiny exact model: a chain of hashes, so that a token tells which weights have made it.

A hidden state is a number of 32 bits in two float32 values, which all sums keep exact. An expert
maps it by a hash of (identity, layer, expert, state); attention chains the states of a sequence
through the pages of the cache, so a slot that is lost or overwritten changes all later tokens.
:func:`tokens_of` computes the same in plain Python, one token after the other.

Dimension letters: T tokens, K experts per token, E experts, R rows to sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from cluster.wire.tensors import MicrobatchBuffers
from experts.checkpoint.checkpoint import Checkpoint
from router.model.attention.interface import Span
from router.model.attention.paged import PagedContext
from router.model.decoder import Decoder, DecoderLayer, MoEFeedForward
from router.moe.gate import Choice
from router.moe.layer import MoELayers
from tests.world.forms import FALLING, logit_of, picked

NUM_LAYERS = 2
NUM_EXPERTS = 6
TOP_K = 2
VOCAB = 512
LAYERS = tuple(range(NUM_LAYERS))
DTYPE = "float32"
KERNEL_CLASS, OTHER_CLASS = "fused", "plain"
POISONS = {
    "poison raises": VOCAB,
    "poison ends routers": VOCAB + 1,
    "poison ends actors": VOCAB + 2,
}
"""Tokens at which a step raises, a router's process ends, and the process of an expert's actor."""
_POISON_STATE = 0xBAD00BAD
_MASK = (1 << 64) - 1
_LOW = (1 << 32) - 1
_NAN = 99.0
"""Stands for what is no number in a hash."""
_STEPS = np.arange(FALLING)
_FALLING = np.array([logit_of(0, token_id, VOCAB) for token_id in range(FALLING)], np.float32)
_SPREAD = 1 << 20
"""Above any sum of K low halves, so that two sums make one number."""


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@cache
def key_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def _rows_of(states: Iterable[int]) -> np.ndarray:
    """Return states [T] as rows [T, 2], the low half first; sooner than numpy where T is small."""
    halves = [half for state in states for half in (state & 0xFFFF, state >> 16)]
    return np.array(halves, np.float32).reshape(-1, 2)


def _numbers(rows: np.ndarray) -> list[int]:
    """Return rows [T, 2], or sums of them, as numbers [T]."""
    try:
        return [int(low) + int(high) * _SPREAD & _MASK for low, high in rows.tolist()]
    except (ValueError, OverflowError):  # not all are numbers
        return _numbers(np.nan_to_num(rows, nan=_NAN, posinf=_NAN, neginf=_NAN))


def _state_of(token_id: int, key: int) -> int:
    """Return the embedding of a token, or do as a poison wants."""
    if token_id < VOCAB:
        return _mix(token_id ^ key) & _LOW
    if token_id == POISONS["poison raises"]:
        raise RuntimeError("no step can be computed with this token")
    if token_id == POISONS["poison ends routers"]:
        os._exit(1)
    return _POISON_STATE


# The slow oracle.


def _sum_of(states: Iterable[int]) -> int:
    """Return the number of the sum of the rows of these states."""
    low = high = 0
    for state in states:
        low += state & 0xFFFF
        high += state >> 16
    return low + high * _SPREAD


def _number_of(state: int) -> int:
    return (state & 0xFFFF) + (state >> 16) * _SPREAD


_POISON_NUMBER = _number_of(_POISON_STATE)


@cache
def _keys_of(identity: str) -> tuple[int, int, list[tuple[int, list[int], list[int]]]]:
    """Return a model's keys: embedding, head, and by layer those of chain, gate and experts."""
    layers = [
        (
            key_of(identity, layer, "chain"),
            [key_of(identity, layer, "gate", expert) for expert in range(NUM_EXPERTS)],
            [key_of(identity, layer, expert) for expert in range(NUM_EXPERTS)],
        )
        for layer in LAYERS
    ]
    return key_of(identity, "embedding"), key_of(identity, "head"), layers


@lru_cache(maxsize=4096)
def tokens_of(
    identity: str, prompt: tuple[int, ...], num_tokens: int, form: str = ""
) -> tuple[int, ...]:
    """Return the tokens of an answer of a form (:mod:`tests.world.forms`)."""
    embedding, head, layers = _keys_of(identity)
    before = [0] * NUM_LAYERS
    ids = list(prompt)
    last = 0
    for position in range(len(prompt) + num_tokens - 1):
        x = _number_of(_mix(ids[position] ^ embedding) & _LOW)
        for layer, (chain, gate, experts) in enumerate(layers):
            x ^= _mix(before[layer] ^ chain)
            state = before[layer] = _mix(x) & _LOW
            row = _number_of(state)
            x = _sum_of(_mix(row ^ experts[e]) & _LOW for e in _chosen(row, gate))
        last = _mix(x ^ head) % VOCAB
        if position >= len(prompt) - 1:
            ids.append(picked(form, last, prompt, ids[len(prompt) :], VOCAB))
    return tuple(ids[len(prompt) :])


def output_of(identity: str, layer: int, expert: int, low: int, high: int) -> tuple[int, int]:
    """Return what an expert makes of a row."""
    state = _mix(low + high * _SPREAD ^ key_of(identity, layer, expert)) & _LOW
    return state & 0xFFFF, state >> 16


def _chosen(row: int, gate: Sequence[int], number: int = TOP_K) -> list[int]:
    scores = [_mix(row ^ key) for key in gate]
    return sorted(range(NUM_EXPERTS), key=scores.__getitem__, reverse=True)[:number]


# The router's part.


class ExactAttention:
    """Stands in for :class:`router.model.attention.interface.Attention`; a view is the spans."""

    page_size = 4
    is_independent = True
    name = "exact"

    def view(self, spans: Sequence[Span], num_decode: int) -> list[Span]:
        return list(spans)


class _Attend:
    """The attention half: each state is a hash of the one before it in its sequence."""

    def __init__(self, identity: str, layer: int, num_slots: int, took_s: Callable[[], float]):
        self._key = key_of(identity, layer, "chain")
        self._cache = [0] * num_slots
        self._took_s = took_s

    def __call__(
        self,
        residual: torch.Tensor,
        output: torch.Tensor | None,
        rotation: Any,
        paged: PagedContext,
    ) -> torch.Tensor:
        time.sleep(self._took_s())
        if output is not None:
            residual += output
        numbers = iter(_numbers(residual.numpy()))
        states = []
        for span in paged.batch.view:
            before = self._cache[span.slots[span.start - 1]] if span.start else 0
            for slot in span.slots[span.start :].tolist():
                number = next(numbers)
                before = _mix(number ^ _mix(before ^ self._key)) & _LOW
                if number == _POISON_NUMBER:
                    before = _POISON_STATE  # a row of it ends its actor
                self._cache[slot] = before
                states.append(before)
        residual.zero_()
        return torch.from_numpy(_rows_of(states))


class _ExactGate:
    """Chooses experts by hashes of the state; all weights are 1."""

    def __init__(self, identity: str, layer: int):
        self._keys = [key_of(identity, layer, "gate", e) for e in range(NUM_EXPERTS)]

    def choice(self, normed: torch.Tensor, *, room: MicrobatchBuffers | None = None) -> Choice:
        ids = np.array([_chosen(row, self._keys) for row in _numbers(normed.numpy())])
        weights = np.ones(ids.shape, np.float32)  # sooner than torch.ones
        return Choice(ids, torch.from_numpy(weights))

    def choose_anew(self, normed: torch.Tensor, rows: np.ndarray, allowed: np.ndarray) -> Choice:
        numbers = _numbers(normed.numpy()[rows])
        ids = np.array(
            [
                sorted(_chosen(row, self._keys, NUM_EXPERTS), key=lambda e: not may[e])[:TOP_K]
                for row, may in zip(numbers, allowed.tolist(), strict=True)
            ]
        )
        weights = np.take_along_axis(allowed, ids, 1).astype(np.float32)
        return Choice(ids, torch.from_numpy(weights))


class ExactModel:
    """Takes the place of :class:`router.model.model.MoEModel`."""

    even_context = float("inf")
    is_native = False
    is_independent = True

    def __init__(
        self, identity: str, cache_tokens: int, layers: MoELayers, took_s: Callable[[], float]
    ):
        """``took_s`` returns the time that a layer's attention takes."""
        self.attention = ExactAttention()
        self.num_pages = cache_tokens // self.attention.page_size
        embedding_key, head_key = (key_of(identity, part) for part in ("embedding", "head"))

        def embedding(ids: torch.Tensor) -> torch.Tensor:
            states = [_state_of(token_id, embedding_key) for token_id in ids.tolist()]
            return torch.from_numpy(_rows_of(states))

        def head(hidden_states: torch.Tensor) -> torch.Tensor:
            tokens = [_mix(n ^ head_key) % VOCAB for n in _numbers(hidden_states.numpy())]
            logits = np.zeros((len(tokens), VOCAB), np.float32)
            for row, token_id in zip(logits, tokens, strict=True):
                row[(token_id + _STEPS) % VOCAB] = _FALLING
            return torch.from_numpy(logits)

        self.decoder = Decoder(
            embedding,
            lambda hidden_states, positions: positions,
            [
                DecoderLayer(
                    _Attend(identity, layer, cache_tokens, took_s),
                    MoEFeedForward(layer, _ExactGate(identity, layer), layers, None, None),
                )
                for layer in LAYERS
            ],
            lambda hidden_states: hidden_states,
            head,
            None,
            self.attention,
            (False,) * NUM_LAYERS,
            None,
        )


# The actors' part.


class ExactCheckpoint(Checkpoint):
    """A checkpoint of the exact model; it is its identity."""

    identity: str

    def __init__(self, identity: str):
        for name, value in (("identity", identity), ("remote", None), ("shape", _Shape())):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class _Shape:
    hidden_size: int = 2
    activation: str = "hash"


@dataclass(frozen=True)
class ExactWeights:
    """The weights of an expert: its name."""

    identity: str
    layer: int
    expert: int

    def parts(self) -> list[np.ndarray]:
        return [np.zeros(1, np.float32)]


class ExactExpert:
    """Takes the place of :class:`experts.bank.GatedFfnExpert`."""

    row_shape = (2,)
    dtype = DTYPE
    grouped = None
    num_bytes = 1000

    def __init__(
        self,
        weights: ExactWeights,
        compute: Callable[[int], Any],
        kernel_class: str = KERNEL_CLASS,
    ):
        """``compute`` returns the seconds that so many rows take, what they raise, or a fault.

        The faults are ``nan``, rows that are not numbers, and ``rows``, one row too few.
        """
        self._key = key_of(weights.identity, weights.layer, weights.expert)
        self._compute = compute
        self.kernel_class = kernel_class

    def takes(self, row_shape: tuple[int, ...]) -> bool:
        return row_shape == self.row_shape

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        took_s = self._compute(len(rows))
        if isinstance(took_s, Exception):
            raise took_s
        if took_s == "nan":
            return np.full(rows.shape, np.nan, np.float32)
        if took_s == "rows":
            return np.zeros((len(rows) - 1, 2), np.float32)
        time.sleep(took_s)
        numbers = _numbers(rows)
        if _POISON_NUMBER in numbers:
            os._exit(1)
        return _rows_of(_mix(number ^ self._key) & _LOW for number in numbers)
