"""Where other layouts have a Mixtral tensor, by what they call its parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from experts.convert.source import Take
from experts.families.base import Config

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")


def takes_by_part(
    config: Config,
    layers: str,
    outer: Mapping[str, str],
    in_layer: Mapping[str, str],
    others: Callable[[str, str], list[Take]],
) -> Callable[[str], list[Take]]:
    """Return what tells where a tensor comes from, for a layout with queries and keys as pairs.

    ``layers`` begins a layer's names; ``outer`` and ``in_layer`` name what is one to one, and
    ``others(prefix of the layer, part)`` answers for the rest of a layer.
    """
    rotary = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }

    def takes(name: str) -> list[Take]:
        found = _layer_part(name)
        if found is None:
            return [Take(outer[name])]
        layer_id, part = found
        prefix = f"{layers}.{layer_id}"
        if part in in_layer:
            return [Take(f"{prefix}.{in_layer[part]}.weight", rotary_heads=rotary.get(part))]
        return others(prefix, part)

    return takes


def _layer_part(name: str) -> tuple[int, str] | None:
    # ``self_attn.q_proj`` is a part; ``None`` stands for a tensor of no layer.
    match = _LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def expert_part(part: str) -> tuple[int, str] | None:
    """Return expert and matrix (``w1``), or ``None`` for a part that is no expert's."""
    match = _EXPERT.fullmatch(part)
    return None if match is None else (int(match[1]), match[2])
