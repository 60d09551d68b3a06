"""Samples the next tokens of a step, all rows at once.

A row's token depends on its logits, its parameters and (seed, choice, position) alone. It depends
neither on the row's place in the batch nor on the other rows, so a request that is retried or moved
gets the same tokens.

Dimension letters: R rows, V vocabulary size, N likeliest tokens reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from router.messages.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """The sampling parameters, the choice and the position of one row."""

    params: SamplingParams
    choice: int
    position: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of each row, and its log probabilities where they were asked for.

    A row whose logits are NaN, or whose largest is infinite, has no token.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None]


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> Drawn:
    """Draw one token per row of fp32 logits [R, V].

    Logits are divided by the temperature. Top-k, top-p and min-p then filter tokens, in this order.
    One uniform number per row picks from the remaining tokens, renormalised. Temperature 0 takes
    the largest logit. Log probabilities are those of the unchanged logits.
    """
    # numpy's argmax is four times as fast as torch's. Both take the first of equal logits.
    # It takes a NaN for the largest.
    values = logits.numpy(force=True)
    largest = values.argmax(axis=-1)
    is_finite = np.isfinite(np.take_along_axis(values, largest[:, None], axis=-1)).ravel().tolist()
    token_ids = torch.from_numpy(largest)
    warm = [i for i, draw in enumerate(draws) if draw.params.temperature > 0]
    if warm:
        rows = torch.tensor(warm)
        token_ids[rows] = _draw(logits[rows], [draws[i] for i in warm])
    ids = [i if finite else None for i, finite in zip(token_ids.tolist(), is_finite, strict=True)]
    return Drawn(ids, _logprobs(logits, ids, draws))


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    params = [draw.params for draw in draws]
    vocab = logits.shape[1]
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64).unsqueeze(1)
    top_k = torch.tensor([min(p.top_k, vocab) or vocab for p in params]).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64).unsqueeze(1)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64).unsqueeze(1)
    # The largest logit is subtracted first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)  # [R, V], descending
    probabilities[torch.arange(vocab).unsqueeze(0) >= top_k] = 0
    before = probabilities.cumsum(dim=-1) - probabilities
    total = probabilities.sum(dim=-1, keepdim=True)
    # top-p keeps the smallest set of tokens whose share reaches top_p.
    probabilities[before >= top_p * total] = 0
    probabilities[probabilities < min_p * probabilities[:, :1]] = 0
    cumulative = probabilities.cumsum(dim=-1)
    target = _uniform(draws).unsqueeze(1) * cumulative[:, -1:]
    picked = (cumulative <= target).sum(dim=-1, keepdim=True)
    # A rounding error at the very end must not pick a token that was filtered out. The first
    # token always stays, also where a tiny temperature or top-p underflows to 0.
    last = ((probabilities > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(1, torch.minimum(picked, last)).squeeze(1)


def _uniform(draws: Sequence[Draw]) -> torch.Tensor:
    """Return one number in [0, 1) per row, a function of (seed, choice, position) alone."""
    seeds = np.array([d.params.seed & 0xFFFFFFFFFFFFFFFF for d in draws], dtype=np.uint64)
    choices = np.array([d.choice for d in draws], dtype=np.uint64)
    positions = np.array([d.position for d in draws], dtype=np.uint64)
    mixed = _mix(_mix(_mix(seeds) ^ choices) ^ positions)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that avalanches."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _logprobs(
    logits: torch.Tensor, ids: Sequence[int | None], draws: Sequence[Draw]
) -> list[TokenLogprobs | None]:
    logprobs: list[TokenLogprobs | None] = [None] * len(draws)
    for i, draw in enumerate(draws):
        token_id = ids[i]
        if draw.params.logprobs is None or token_id is None:
            continue
        row = logits[i].log_softmax(dim=-1)
        top = row.topk(min(draw.params.logprobs, row.shape[0]))
        logprobs[i] = TokenLogprobs(
            logprob=float(row[token_id]),
            top_ids=tuple(top.indices.tolist()),
            top_logprobs=tuple(top.values.tolist()),
        )
    return logprobs
