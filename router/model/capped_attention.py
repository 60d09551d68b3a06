"""Attention with capped scores or sinks, for which torch's own attention has no arguments.

Dimension letters: Q query heads, G key/value heads, R = Q / G, C tokens, L keys, D
head size.
"""

from __future__ import annotations

import torch


def attend_by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend queries [..., C, D] to keys and values [..., L, D]; returns [..., C, D].

    ``mask`` is true where a query attends. ``softcap`` c turns a score s into c tanh(s / c).
    ``sinks`` [..., C or 1, 1] are scores that take a share of the softmax and add no value.
    """
    scores = torch.matmul(query, keys.transpose(-1, -2)).float().mul_(scaling)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
    shares = scores.softmax(-1)[..., : keys.shape[-2]]
    return shares.to(values.dtype) @ values


def chunk_by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend a chunk [Q, C, D] to keys and values [G, 1, L, D]; returns [1, C, Q, D]."""
    num_kv, _, length, size = keys.shape
    num_tokens = query.shape[1]
    tokens = query.reshape(num_kv, -1, num_tokens, size)  # [G, R, C, D]
    if mask is None:
        mask = torch.ones(num_tokens, length, dtype=torch.bool, device=query.device).tril()
    per_head = None if sinks is None else sinks.view(num_kv, -1, 1, 1)
    output = attend_by_scores(tokens, keys, values, mask, scaling, softcap, per_head)
    return output.flatten(0, 1).transpose(0, 1).unsqueeze(0)
