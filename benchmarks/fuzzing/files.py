"""Targets: the files of a checkpoint in every layout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save, save_file

from benchmarks.common import SIZES, make_checkpoint
from benchmarks.fuzzing.target import Target, check_refusal
from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.identity import identity_of
from experts.checkpoint.shards import INDEX_FILE, WEIGHTS_FILE, read_header
from workshop.convert.gguf_file import open_gguf
from workshop.convert.plan import make_plan
from workshop.convert.write import open_source

TINY = {
    **SIZES, "vocab_size": 257, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
    "num_experts_per_tok": 1, "max_position_embeddings": 64,
}  # fmt: skip
PARAMS: dict[str, Any] = {
    "dim": 8, "n_layers": 1, "head_dim": 4, "hidden_dim": 4, "n_heads": 2, "n_kv_heads": 1,
    "norm_eps": 1e-5, "vocab_size": 16, "rope_theta": 10000.0, "max_seq_len": 64,
    "moe": {"num_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
MAX_SHARD_BYTES = 1 << 30


def header() -> Target:
    """Return the target of a safetensors file's header."""
    folder = _Folder()
    file = folder.path / WEIGHTS_FILE

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with folder.refusals():
            place = 8 + int.from_bytes(data[:8], "little")
            for name, info in read_header(file).items():
                assert info.begin == place, f"{name} begins at {info.begin}, not {place}"
                place = info.end
            assert place == len(data), f"the tensors end at {place} of {len(data)} bytes"

    few = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}
    return Target([save(few), save({}), save(few, {"format": "pt"})], run)


def config() -> Target:
    """Return the target of ``config.json``."""
    folder = _Folder()
    make_checkpoint(folder.path, "float32", sizes=TINY)
    return _checkpoint_with(folder, "config.json")


def index() -> Target:
    """Return the target of the index of shards."""
    folder = _Folder()
    make_checkpoint(folder.path, "float32", sizes=TINY)
    (folder.path / WEIGHTS_FILE).rename(folder.path / "a.safetensors")
    weight_map = dict.fromkeys(read_header(folder.path / "a.safetensors"), "a.safetensors")
    content = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder.path / INDEX_FILE).write_text(content)
    return _checkpoint_with(folder, INDEX_FILE)


def _checkpoint_with(folder: _Folder, name: str) -> Target:
    num_tensors = len(open_checkpoint(folder.path).tensors)

    def run(data: bytes) -> None:
        (folder.path / name).write_bytes(data)
        with folder.refusals():
            checkpoint = open_checkpoint(folder.path)
            assert len(checkpoint.tensors) == num_tensors
            identity_of(checkpoint)
        with folder.refusals():
            make_plan(open_source(folder.path), "auto", MAX_SHARD_BYTES)

    return Target([(folder.path / name).read_bytes()], run)


def params() -> Target:
    """Return the target of ``params.json``, which Mistral's own layout has."""
    folder = _Folder()
    save_file({"norm.weight": np.zeros(8, np.float32)}, folder.path / "consolidated.00.safetensors")

    def run(data: bytes) -> None:
        (folder.path / "params.json").write_bytes(data)
        with folder.refusals():
            make_plan(open_source(folder.path), "auto", MAX_SHARD_BYTES)
            raise AssertionError("a plan without tensors")

    return Target([json.dumps(PARAMS).encode()], run)


def gguf() -> Target:
    """Return the target of a GGUF file."""
    from gguf import GGUFWriter

    folder = _Folder()
    file = folder.path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(4)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((16, 8), np.float32))
    writer.add_tensor("blk.0.ffn_down_exps.weight", np.zeros((2, 8, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    seed = file.read_bytes()

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with folder.refusals():
            source = open_gguf(file)
            for name, entry in source.tensors.entries.items():
                if entry.shape:
                    source.tensors.read(name, 0, min(1, entry.shape[0]))
            make_plan(source, "auto", MAX_SHARD_BYTES)

    return Target([seed], run)


def tokenizer() -> Target:
    """Return the target of ``tokenizer.json``."""
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    from router.gateway.input.tokenizer import Tokenizer

    vocab = {char: place for place, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    raw = RawTokenizer(models.BPE({**vocab, "ab": 256, "</s>": 257}, [("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["</s>"])
    folder = _Folder()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder.path / "tokenizer_config.json").write_text(json.dumps(settings))

    def run(data: bytes) -> None:
        (folder.path / "tokenizer.json").write_bytes(data)
        with folder.refusals():
            loaded = Tokenizer.load(str(folder.path))
            ids = loaded.encode("ab, ü 🙂")
            loaded.decode(ids)
            for token_id in [*ids, 0, 257, 1 << 20]:
                loaded.token_text(token_id)

    return Target([raw.to_str().encode()], run)


class _Folder:
    """A folder that goes with its target."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.path = Path(self._kept.name)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Let through what is refused well: an error that names a file of the folder, or it."""
        try:
            yield
        except CheckpointError as error:
            check_refusal(error, str(self.path))
