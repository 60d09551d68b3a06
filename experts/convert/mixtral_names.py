"""Taking a Mixtral tensor's name apart, for the layouts that call it otherwise."""

from __future__ import annotations

import re

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")


def layer_part(name: str) -> tuple[int, str] | None:
    """Return layer and part (``self_attn.q_proj``), or ``None`` for a tensor of no layer."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def expert_part(part: str) -> tuple[int, str] | None:
    """Return expert and matrix (``w1``), or ``None`` for a part that is no expert's."""
    match = _EXPERT.fullmatch(part)
    return None if match is None else (int(match[1]), match[2])
