"""Attention with capped scores or sinks, for which torch's own attention has no arguments.

Dimension letters: Q query heads, G key/value heads, R = Q / G, C tokens, L keys, D
head size.
"""

from __future__ import annotations

import torch

from router.model.attention.interface import Scoring


def attend_by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attend queries [G, B, R, D] to keys and values [G, B, L, D]; returns [G, B, R, D].

    ``mask`` is true where a query attends.
    """
    sinks = None if scoring.sinks is None else scoring.sinks.view(query.shape[0], 1, -1, 1)
    return _by_scores(query, keys, values, mask, scoring, sinks)


def chunk_by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attend a chunk [Q, C, D] to keys and values [G, 1, L, D]; returns [1, C, Q, D]."""
    num_kv, _, length, size = keys.shape
    num_tokens = query.shape[1]
    tokens = query.reshape(num_kv, -1, num_tokens, size)  # [G, R, C, D]
    if mask is None:
        mask = torch.ones(num_tokens, length, dtype=torch.bool, device=query.device).tril()
    sinks = None if scoring.sinks is None else scoring.sinks.view(num_kv, -1, 1, 1)
    output = _by_scores(tokens, keys, values, mask, scoring, sinks)
    return output.flatten(0, 1).transpose(0, 1).unsqueeze(0)


def _by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend queries [..., C, D] to keys and values [..., L, D]; returns [..., C, D].

    ``sinks`` are [..., C or 1, 1].
    """
    scores = torch.matmul(query, keys.transpose(-1, -2)).float().mul_(scoring.scaling)
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
    shares = scores.softmax(-1)[..., : keys.shape[-2]]
    return shares.to(values.dtype) @ values
