"""Dense models in GGUF files: llama.cpp's architectures ``llama`` and ``qwen2``.

``llama`` is Mistral's too. It stores the rows of queries and keys as rotary pairs, and ``qwen2``
does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cluster.errors import CheckpointError, shown
from experts.convert.gguf_file import IN_LAYER, OUTER, GgufFile, attention_config
from experts.convert.source import Source, Take
from experts.families.base import Config

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_FEED_FORWARD = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def open_dense_gguf(path: Path) -> Source:
    """Open a dense model's file and read its metadata; raises :class:`CheckpointError`."""
    file = GgufFile(path)
    architecture = str(file.field("general.architecture"))
    if architecture not in _CLASSES:
        raise CheckpointError(
            f"has the architecture {shown(architecture)}; possible: {', '.join(_CLASSES)}",
            str(path),
        )
    if file.number(f"{architecture}.expert_count", 0):
        raise CheckpointError("has experts already, so it is no dense model", str(path))
    config = attention_config(file, architecture) | {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
    }
    return Source("gguf", path, path, config, file, _takes(config), (path,))


def _takes(config: Config) -> Callable[[str], list[Take]]:
    rotary = {}
    if config["model_type"] == "llama":
        rotary = {
            "self_attn.q_proj": config["num_attention_heads"],
            "self_attn.k_proj": config["num_key_value_heads"],
        }

    def takes(name: str) -> list[Take]:
        match = _NAME.fullmatch(name)
        if match is None:
            return [Take(OUTER[name])] if name in OUTER else []
        part = match[2]
        theirs = (IN_LAYER | _FEED_FORWARD).get(part)
        if theirs is None:
            return []
        found = f"blk.{int(match[1])}.{theirs}.{match[3]}"
        return [Take(found, rotary_heads=rotary.get(part))]

    return takes
