"""Dense Llama-like models, which are not served, as sources of mixtures, and their tokenizers.

A folder with ``config.json`` and safetensors, or a GGUF file of llama.cpp's architectures
``llama``, which is Mistral's too, and ``qwen2``. Tensors have transformers' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.errors import CheckpointError, shown
from experts.checkpoint.config import read_json
from experts.checkpoint.config_checks import is_size
from experts.checkpoint.hub import name_of
from experts.checkpoint.stored import resolve_folder
from experts.families.base import Config
from workshop.convert.gguf_file import IN_LAYER, OUTER, GgufFile, attention_config, is_gguf
from workshop.convert.gguf_tokenizer import write_tokenizer
from workshop.convert.huggingface import CONFIG_FILE, is_huggingface, shards_of
from workshop.convert.source import SafetensorsFiles, Source, takes_by_part

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


_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A dense model that is not served; ``source.folder`` has its tokenizer."""

    source: Source

    @property
    def name(self) -> str:
        """The name of its folder or file, or its hub id with the commit."""
        return name_of(self.source.path)

    @property
    def family(self) -> str:
        """Its ``model_type``."""
        return str(self.source.config["model_type"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the files with weights."""
        return sum(file.stat().st_size for file in self.source.files if file.suffix in _WEIGHTS)

    @property
    def folder(self) -> Path:
        """The folder of its tokenizer."""
        return self.source.folder

    @property
    def config(self) -> Config:
        """Its ``config.json``."""
        return self.source.config

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._size("vocab_size")

    @property
    def max_position_embeddings(self) -> int:
        """Its longest context in tokens."""
        return self._size("max_position_embeddings")

    def _size(self, key: str) -> int:
        value = self.source.config.get(key)
        if not is_size(value):
            raise CheckpointError(f"lacks a positive {key}", str(self.source.config_file))
        return int(value)  # type: ignore[arg-type]


@contextmanager
def opened_dense(path: str) -> Iterator[DenseModel]:
    """Open a folder, a hub id or a GGUF file; the tokenizer of GGUF is there until the end.

    Raises as :func:`open_dense` does, and :class:`CheckpointError` for a
    tokenizer in GGUF that is not known.
    """
    found = Path(path).absolute() if Path(path).exists() else resolve_folder(path)
    source = open_dense(found)
    if not isinstance(source.tensors, GgufFile):
        yield DenseModel(source)
        return
    with TemporaryDirectory(prefix="expertmesh-") as folder:
        write_tokenizer(source.tensors, Path(folder))
        yield DenseModel(replace(source, text_folder=Path(folder)))
