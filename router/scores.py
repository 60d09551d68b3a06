"""Attention by its scores written out, for what torch's own has no argument: a cap, and sinks.

Dimension letters: G key/value heads, R query heads to one, B sequences, C tokens, L keys, D head
size.
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

    ``mask`` is true where a query may look. ``softcap`` c makes a score s to c tanh(s / c).
    ``sinks`` [..., C or 1, 1] are scores that take their share of the softmax and give nothing.
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
