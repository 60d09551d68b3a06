"""GGUF files, which the ``gguf`` package reads and dequantises.

llama.cpp stores the experts of a layer in one tensor [experts, rows, columns]; older files have a
tensor for each expert. Its architecture ``llama`` stores the rows of queries and keys as rotary
pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import CheckpointError, shown, shown_name
from experts.families.base import Config
from workshop.convert.source import QUANTISED, Entry, Source, Take, expert_part, takes_by_part

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"
MAX_VALUES = 4_000_000
"""The most values of a file's metadata; 250,000 tokens with their merges have two million."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_MATRICES = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def is_gguf(path: Path) -> bool:
    """Return whether a file starts with GGUF's magic number; raises :class:`CheckpointError`."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(path)) from None


def open_gguf(path: Path) -> Source:
    """Open a file and read its metadata; raises :class:`CheckpointError`."""
    file = GgufFile(path)
    architecture = str(file.field("general.architecture"))
    if architecture != "llama":
        raise CheckpointError(
            f"has the architecture {shown(architecture)}; known: llama", str(path)
        )
    config = _mixtral_config(file)
    return Source("gguf", path, path, config, file, (path,), _mixtral_takes(config))


class GgufFile:
    """The metadata and the tensors of a file."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise CheckpointError(
                "reading GGUF needs an extra; run pip install 'expertmesh[gguf]'", str(path)
            ) from None
        self.path = path
        self._dequantize = gguf.quants.dequantize
        try:
            self._reader = _bounded_reader(gguf.GGUFReader)(path)
        except Exception as error:  # any error, since the reader trusts the lengths in the file
            reason = shown(f"{type(error).__name__}: {error}")
            raise CheckpointError(f"is not a complete GGUF file ({reason})", str(path)) from None
        if self.number("split.count", 1) > 1:
            raise CheckpointError(
                "is one of several parts; join them with llama-gguf-split --merge", str(path)
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.entries = {name: _entry(tensor) for name, tensor in self._tensors.items()}

    def field(self, key: str, default: Any = None) -> Any:
        """Return a value of the metadata; raises CheckpointError without a value or ``default``."""
        found = self._reader.get_field(key)
        if found is not None:
            return self._contents(key, found)
        if default is None:
            raise CheckpointError(f"lacks the metadata {key}", str(self.path))
        return default

    def _contents(self, key: str, found: Any) -> Any:
        try:
            return found.contents()
        except Exception as error:  # for instance for text that is not UTF-8
            reason = type(error).__name__
            raise CheckpointError(f"{key} cannot be read ({reason})", str(self.path)) from None

    def number(self, key: str, default: int | None = None) -> int:
        """Return an integer of the metadata; raises CheckpointError for any other value."""
        value = self.field(key, default)
        if type(value) is not int:
            raise CheckpointError(f"{key} must be an integer", str(self.path))
        return value

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows of a tensor in float32; only these rows are dequantised."""
        import numpy as np
        import torch

        tensor = self._tensors[name]
        rows = np.ascontiguousarray(tensor.data[begin:end])
        try:
            values = self._dequantize(rows, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"tensor {shown_name(name)}: {error}", str(self.path)) from None
        return torch.from_numpy(np.array(values, dtype=np.float32))


def _bounded_reader(reader: Any) -> Any:
    """Return gguf's reader with an error at the end of the file and after :data:`MAX_VALUES`.

    gguf's own reader returns empty values beyond the end of the file, and reads as many values as
    the file claims.
    """

    class BoundedReader(reader):  # type: ignore[misc]
        values = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            self.values += 1
            if self.values > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES} values")
            found = super()._get(offset, dtype, count, *order, **named)
            if len(found) != int(count):
                raise ValueError(f"ends before the {count} values at {offset}")
            return found

    return BoundedReader


def _entry(tensor: Any) -> Entry:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return Entry(shape, _DTYPES.get(tensor.tensor_type.name, QUANTISED))


def _mixtral_config(file: GgufFile) -> Config:
    if file.field("llama.expert_count", 0) == 0:
        raise CheckpointError("has no experts (llama.expert_count)", str(file.path))
    return attention_config(file, "llama") | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": file.number("llama.expert_count"),
        "num_experts_per_tok": file.number("llama.expert_used_count"),
    }


def attention_config(file: GgufFile, architecture: str) -> Config:
    """Return all of a Llama-like configuration but its class and its experts.

    Raises :class:`CheckpointError` for missing metadata, and for what transformers' classes lack.
    """

    def number(key: str, default: int | None = None) -> int:
        return file.number(f"{architecture}.{key}", default)

    scaling = file.field(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(
            f"{architecture}.rope.scaling.type {shown(scaling)} is not supported", str(file.path)
        )
    embedding = file.entries.get(OUTER["model.embed_tokens.weight"])
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("lacks a matrix token_embd.weight", str(file.path))
    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", hidden // max(heads, 1))
    if number("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"{architecture}.rope.dimension_count must equal the size of a head", str(file.path)
        )
    return {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "rms_norm_eps": _shortest(file.field(f"{architecture}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(file.field(f"{architecture}.rope.freq_base", 10_000.0)),
        "max_position_embeddings": number("context_length"),
        "sliding_window": None,
        "tie_word_embeddings": OUTER["lm_head.weight"] not in file.entries,
        "bos_token_id": file.number("tokenizer.ggml.bos_token_id", 1),
        "eos_token_id": file.number("tokenizer.ggml.eos_token_id", 2),
    }


def _shortest(value: float) -> float:
    """Return the shortest decimal number of GGUF's float32 value."""
    import numpy as np

    return float(str(np.float32(value)))


def _mixtral_takes(config: Config) -> Callable[[str], list[Take]]:
    def expert_takes(prefix: str, part: str) -> list[Take]:
        expert = expert_part(part)
        if expert is None:
            return []
        expert_id, matrix = expert
        stacked = (expert_id, config["num_local_experts"])
        return [
            Take(f"{prefix}.{_MATRICES[matrix]}_exps.weight", part=stacked),
            Take(f"{prefix}.{_MATRICES[matrix]}.{expert_id}.weight"),
        ]

    return takes_by_part(config, "blk", OUTER, IN_LAYER, expert_takes)
