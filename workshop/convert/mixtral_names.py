"""The places of Mixtral's and dense tensors in other layouts, by the names of their parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from experts.families.base import Config
from workshop.convert.source import Take

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")


def takes_by_part(
    config: Config,
    layers: str,
    outer: Mapping[str, str],
    in_layer: Mapping[str, str],
    rest: Callable[[str, str], list[Take]] = lambda prefix, part: [],
) -> Callable[[str], list[Take]]:
    """Return the function from a tensor's name to its takes, for a layout of llama.cpp or Mistral.

    ``layers`` is the prefix of all layers' names. ``outer`` and ``in_layer`` have the layout's name
    of a tensor outside and inside of a layer. ``rest(prefix of the layer, part)`` returns the takes
    of all other tensors of a layer. Queries and keys are rotary pairs, but not those of Qwen2.
    """
    rotary = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    rotary = {} if config["model_type"] == "qwen2" else rotary

    def takes(name: str) -> list[Take]:
        match = _LAYER.fullmatch(name)
        if match is None:
            return [Take(outer[name])] if name in outer else []
        prefix, part, kind = f"{layers}.{int(match[1])}", match[2], match[3]
        if part in in_layer:
            return [Take(f"{prefix}.{in_layer[part]}.{kind}", rotary_heads=rotary.get(part))]
        return rest(prefix, part)

    return takes


def expert_part(part: str) -> tuple[int, str] | None:
    """Return the expert and the matrix (``w1``) of a part, or ``None`` for any other part."""
    match = _EXPERT.fullmatch(part)
    return None if match is None else (int(match[1]), match[2])
