"""Samples the next tokens of a step, all rows at once, where the logits are.

:func:`router.engine.batch.sampling_of` turns the rows' parameters into tensors, which go to the
logits' device with the step's inputs. :func:`sample` draws there, and the host reads nothing
meanwhile. :func:`read` turns the drawn tensors into tokens on the host.

A row's token depends only on its logits, its parameters and (seed, choice, position). It depends
neither on the row's place in the batch nor on the other rows, so a request that is retried or moved
gets the same tokens.

Dimension letters: R rows, V vocabulary size, W rows with a temperature above 0, N likeliest tokens
reported, A rows that have them reported, E logits that are edited, G rows with a grammar, C words
of 32 bits with a bit for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple

import torch

from cluster.native import native
from router.engine.token_rules import Edits
from router.messages.request import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from router.engine.constrained_rows import Forbidden

VALUES_AT_ONCE = 1 << 21
"""The most logits that are sorted or turned into log probabilities at a time. It bounds the memory
that a device needs for this, some 60 bytes each; no token depends on it."""
_MINUS_INF_BITS = -(1 << 23)
"""fp32's -inf, read as int32."""


@dataclass(frozen=True, slots=True)
class Draw:
    """The sampling parameters, the choice and the position of one row, and its logits' edits."""

    params: SamplingParams
    choice: int
    position: int
    edits: Edits | None = None


class SamplingTensors(NamedTuple):
    """The part of :class:`Sampling` that is used on the logits' device."""

    warm_rows: torch.Tensor
    """int64 [W]; the other rows are greedy."""
    warm_params: torch.Tensor
    """fp64 [5, W]: temperature, top-k (infinite for all), top-p, min-p, and a number in [0, 1)."""
    logprob_rows: torch.Tensor
    """int64 [A], in ascending order of their N."""
    edited: torch.Tensor
    """int64 [2, E]: the rows and the tokens of the edited logits, each pair once."""
    edits: torch.Tensor
    """fp32 [3, E]; see :class:`router.engine.token_rules.Edits`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a step's rows are sampled; made on the host, once a step.

    ``logprob_sizes`` are (N, the number of ``logprob_rows`` with this N), in order.
    """

    tensors: SamplingTensors
    logprob_sizes: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of each row, and its log probabilities if requested.

    A row with NaN logits, or whose largest logit is infinite, has no token.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None]
    barred: frozenset[int] = frozenset()
    """The rows in which every token is forbidden; they have no token either."""


def sample(
    logits: torch.Tensor,
    tensors: SamplingTensors,
    logprob_sizes: Sequence[tuple[int, int]],
    forbidden: Forbidden | None = None,
) -> list[torch.Tensor]:
    """Draw one token per row of fp32 logits [R, V]; returns what :func:`read` takes.

    The result is ids int64 [R, 1] and the rows' largest logits after edits, fp32 [R, 1]. Then, for
    a few of ``logprob_rows`` at a time, come the log probabilities of their tokens, fp32 [A, 1],
    and the log probabilities and ids of the likeliest, [A, N]. All tensors are on one device.

    Edits of single logits come first, and no token ``forbidden`` in its row is drawn. Logits are
    then divided by the temperature. Top-k, top-p and min-p filter tokens, in this order. One
    uniform number per row picks from the remaining tokens, in vocabulary order, by their shares.
    Temperature 0 takes the first of the largest logits. Log probabilities come from the unchanged
    logits; a device may add in a different order from a CPU, and report different tokens among
    equally likely ones.
    """
    warm_rows, warm_params, logprob_rows, places, edits = tensors
    edited = _edited(logits, places, edits) if places.shape[1] else logits
    if forbidden is not None:
        edited = _without(edited, forbidden)
    token_ids = _largest(edited)
    # Edits keep a NaN; an infinite logit stays infinite or becomes NaN. Both count as the largest.
    sampled = [token_ids, edited.gather(1, token_ids)]
    vocab = logits.shape[1]
    at_once = max(1, VALUES_AT_ONCE // vocab)
    if len(warm_rows):
        parts = zip(warm_rows.split(at_once), warm_params.split(at_once, dim=1), strict=True)
        for rows, params in parts:
            token_ids.index_copy_(0, rows, _draw(_select(edited, rows), params))
    if logprob_sizes:
        sizes = [size for _, size in logprob_sizes]
        for (num, _), same in zip(logprob_sizes, logprob_rows.split(sizes), strict=True):
            for rows in same.split(at_once):
                logprobs = _select(logits, rows).log_softmax(dim=-1)
                top = logprobs.topk(min(num, vocab))
                sampled += [logprobs.gather(1, _select(token_ids, rows)), top.values, top.indices]
    return sampled


def read(sampled: Sequence[torch.Tensor], sampling: Sampling) -> Drawn:
    """Return the tokens of :func:`sample`, whose tensors are now on the host."""
    ids, largest, *reported = [tensor.tolist() for tensor in sampled]
    token_ids = [i if isfinite(x) else None for [i], [x] in zip(ids, largest, strict=True)]
    logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
    if reported:
        rows = sampling.tensors.logprob_rows.tolist()
        columns = [chain.from_iterable(reported[part::3]) for part in range(3)]
        for row, [logprob], top_logprobs, top_ids in zip(rows, *columns, strict=True):
            if token_ids[row] is not None:
                logprobs[row] = TokenLogprobs(logprob, tuple(top_ids), tuple(top_logprobs))
    barred = frozenset(row for row, [x] in enumerate(largest) if x == -inf)
    return Drawn(token_ids, logprobs, barred)


def _edited(logits: torch.Tensor, places: torch.Tensor, edits: torch.Tensor) -> torch.Tensor:
    """Return a copy of the logits with its edits; NaN stays NaN."""
    rows, token_ids = places
    before, scale, after = edits
    sums = logits[rows, token_ids] + before
    copy = logits.clone()
    copy[rows, token_ids] = torch.where(sums > 0, sums / scale, sums * scale) + after
    return copy


def _without(logits: torch.Tensor, forbidden: Forbidden) -> torch.Tensor:
    """Return a copy of the logits in which forbidden tokens cannot be drawn; NaN stays NaN."""
    rows, words = forbidden
    masked = _where_allowed(_select(logits, rows).contiguous(), words)
    return masked if len(rows) == len(logits) else logits.index_copy(0, rows, masked)


def _where_allowed(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return logits [G, V], and -inf where a token's bit in ``words`` int32 [G, C] is 0."""
    if native is not None and logits.is_cpu:
        masked = torch.empty_like(logits)
        native.forbid(words.numpy(), len(words), logits.numpy(), masked.numpy())
        return masked
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = (words.unsqueeze(2) >> places).bitwise_and_(1).flatten(1)[:, : logits.shape[1]]
    return logits + bits.sub(1).bitwise_and_(_MINUS_INF_BITS).view(torch.float32)


def _select(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return these distinct, ascending rows of a tensor; for all rows, the tensor itself."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, rows)


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of each row's largest logit, [R, 1]; the first among equals.

    numpy and torch promise the first, on every device. Both treat NaN as the largest.
    """
    if logits.is_cpu:  # numpy's argmax is four times as fast as torch's
        return torch.from_numpy(logits.numpy().argmax(axis=-1, keepdims=True))
    return logits.argmax(dim=-1, keepdim=True)


def _draw(logits: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Draw from logits [W, V] by ``warm_params``; returns int64 [W, 1]."""
    if native is None or not logits.is_cpu:
        return _draw_by_torch(logits, params)
    drawn = torch.empty(len(logits), 1, dtype=torch.int64)
    given = logits.contiguous().numpy(), params.contiguous().numpy()
    native.draw(*given, len(logits), drawn.numpy())
    return drawn


def _draw_by_torch(logits: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Draw from logits [W, V] by ``warm_params``; returns int64 [W, 1].

    On a device the host reads nothing, so all rows are sorted and searched by sums.
    """
    temperature, top_k, top_p, min_p, uniform = params.unsqueeze(2)  # [W, 1] each
    # The largest logit is subtracted first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).double().div_(temperature)
    weights = scaled.exp_() if logits.is_cpu else _whole_weights(scaled)
    ordered = weights.sort(dim=-1, descending=True).values
    _cut(weights, *_least_kept(weights, ordered, top_k, top_p))
    weights.masked_fill_(weights < min_p * weights.amax(dim=-1, keepdim=True), 0)
    cumulative = weights.cumsum_(dim=-1)
    total = cumulative[:, -1:].clone()
    picked = _num_below(cumulative, uniform * total, or_equal=True)
    # A rounding error at the very end must not pick a token that was filtered out.
    last = _num_below(cumulative, total, or_equal=False)
    return torch.minimum(picked, last).clamp_(max=weights.shape[1] - 1)  # NaN rows find nothing


def _num_below(ascending: torch.Tensor, bound: torch.Tensor, or_equal: bool) -> torch.Tensor:
    """Return how many of each row's values, [W, V] in ascending order, are below its bound."""
    if ascending.is_cpu:
        return torch.searchsorted(ascending, bound, right=or_equal)
    return (ascending <= bound if or_equal else ascending < bound).sum(dim=-1, keepdim=True)


def _least_kept(
    weights: torch.Tensor, ordered: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least weight that top-k and top-p keep, and how many they keep, [W, 1] each.

    ``ordered`` [W, V] are the weights of each row in descending order. The likeliest token always
    stays, even if top-p underflows to 0.
    """
    ranks = torch.arange(ordered.shape[1], device=weights.device)
    of_top_k = ordered.masked_fill(ranks >= top_k, 0)
    reached = of_top_k.cumsum(dim=-1)
    total = torch.where(top_k >= weights.shape[1], weights.cumsum(dim=-1)[:, -1:], reached[:, -1:])
    # top-p keeps the smallest set of tokens whose share reaches top_p.
    is_kept = (ranks < top_k) & (reached - of_top_k < top_p * total)
    num_kept = is_kept.sum(dim=-1, keepdim=True).clamp(min=1)
    return ordered.gather(1, num_kept - 1), num_kept


def _cut(weights: torch.Tensor, least: torch.Tensor, num_kept: torch.Tensor) -> None:
    """Zero all weights [W, V] except the ``num_kept`` largest, of which ``least`` is the least.

    Among equal weights the first tokens are kept.
    """
    weights.masked_fill_(weights < least, 0)
    num_over = (weights > 0).sum(dim=-1, keepdim=True) - num_kept
    if not weights.is_cpu or (num_over > 0).any():  # some equal the last one kept
        is_least = weights == least
        num_least = is_least.sum(dim=-1, keepdim=True) - num_over
        weights.masked_fill_(is_least & (is_least.cumsum(dim=-1) > num_least), 0)


def _whole_weights(scaled: torch.Tensor) -> torch.Tensor:
    """Return exp of fp64 [W, V], at most 0, as integers small enough that V of them fit int64.

    CUDA adds fp64 in an order that changes with the number of rows, or from run to run; the order
    changes no sum of integers. With 150,000 tokens each has 44 bits.
    """
    num_bits = 62 - scaled.shape[-1].bit_length()
    return (scaled.exp() * 2.0**num_bits).round().long()
