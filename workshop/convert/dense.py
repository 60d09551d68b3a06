"""Dense Llama-like checkpoints, which are not served, as sources of mixtures.

A folder with ``config.json`` and safetensors, or a GGUF file of llama.cpp's architectures
``llama``, which is Mistral's too, and ``qwen2``. Tensors have transformers' names.
"""

from __future__ import annotations

from pathlib import Path

from cluster.errors import CheckpointError, shown
from experts.checkpoint.config import read_json
from experts.families.base import Config
from workshop.convert.gguf_file import IN_LAYER, OUTER, GgufFile, attention_config, is_gguf
from workshop.convert.huggingface import CONFIG_FILE, is_huggingface, shards_of
from workshop.convert.mixtral_names import takes_by_part
from workshop.convert.safetensors_files import SafetensorsFiles
from workshop.convert.source import Source

DENSE_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
"""By ``model_type``: transformers' class."""
REFUSED = {
    "qwen3": "Qwen2-MoE has no norms of queries and keys",
    "gemma": "no mixture format has its norms and its scaled embedding",
    "gemma2": "no mixture format has its norms and its scaled embedding",
    "gemma3_text": "no mixture format has its norms and its scaled embedding",
    "phi3": "its matrices are fused",
}
"""Why other dense models cannot be upcycled."""
_IN_GGUF = ("llama", "qwen2")
_FEED_FORWARD = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_UNSUPPORTED = ("quantization_config", "mlp_bias", "attention_bias")


def open_dense(path: Path) -> Source:
    """Open a dense model; reads its configuration and headers, and no weight.

    Raises :class:`CheckpointError` for a path that is no such model, for a family other than
    :data:`DENSE_CLASSES`, and for biases or quantised weights, which are not supported.
    """
    if path.is_file() and is_gguf(path):
        return _open_gguf(path)
    if not path.is_dir() or not is_huggingface(path):
        raise CheckpointError(
            "is not a dense model; must be a folder with config.json and safetensors, or a .gguf "
            "file",
            str(path),
        )
    file = path / CONFIG_FILE
    config = read_json(file)
    _check(config, file)
    shards = shards_of(path)
    return Source("huggingface", path, file, config, SafetensorsFiles(shards), (file, *shards))


def _open_gguf(path: Path) -> Source:
    file = GgufFile(path)
    architecture = str(file.field("general.architecture"))
    if architecture not in _IN_GGUF:
        raise CheckpointError(
            f"has the architecture {shown(architecture)}; supported: {', '.join(_IN_GGUF)}",
            str(path),
        )
    if file.number(f"{architecture}.expert_count", 0):
        raise CheckpointError("already has experts, so it is not a dense model", str(path))
    config = attention_config(file, architecture) | {
        "architectures": [DENSE_CLASSES[architecture]],
        "model_type": architecture,
    }
    takes = takes_by_part(config, "blk", OUTER, IN_LAYER | _FEED_FORWARD)
    return Source("gguf", path, path, config, file, (path,), takes)


def _check(config: Config, file: Path) -> None:
    model_type = str(config.get("model_type"))
    wanted = DENSE_CLASSES.get(model_type)
    if wanted is None:
        known = ", ".join(DENSE_CLASSES)
        reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        raise CheckpointError(
            f"model_type {shown(model_type)} cannot be upcycled{reason}; supported: {known}",
            str(file),
        )
    architectures = config.get("architectures") or [wanted]
    if architectures != [wanted]:
        raise CheckpointError(
            f"unknown architectures: {shown(architectures)}; known: {wanted}", str(file)
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(f"{key} cannot be upcycled", str(file))
