"""Writes a Mixtral checkpoint as GGUF, for llama.cpp and its relatives.

Letters: H heads, D values of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from experts.checkpoint.checkpoint import Checkpoint

MOE = "block_sparse_moe"
PROJECTIONS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
EXPERT_MATRICES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
GATE = "ffn_gate_inp"


def write_gguf(folder: Path, file: Path, kind: str, architecture: str) -> None:
    """Write the checkpoint in ``folder`` to ``file``.

    ``kind`` is GGUF's name of the matrices' number format, such as ``F16`` or ``Q8_0``. Vectors and
    the gates stay in fp32, as llama.cpp's own converter has them. The file has no tokenizer. Needs
    the package ``gguf``.
    """
    import gguf

    from experts.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    config = _config(folder)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in _tensors(checkpoint, config):
        is_matrix = weight.dim() > 1 and GATE not in name
        stored = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _config(folder: Path) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig.from_pretrained(folder)


def _tensors(checkpoint: Checkpoint, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors in fp32 by their names in GGUF."""
    import torch

    from cluster.wire.tensors import from_array
    from experts.checkpoint.expert_weights import read_tensor

    def read(name: str) -> torch.Tensor:
        return from_array(read_tensor(checkpoint, f"{name}.weight", "float32")).float()

    num_heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    yield "token_embd.weight", read("model.embed_tokens")
    yield "output_norm.weight", read("model.norm")
    yield "output.weight", read("lm_head")
    for number in range(config.num_hidden_layers):
        layer, block = f"model.layers.{number}", f"blk.{number}"
        yield f"{block}.attn_norm.weight", read(f"{layer}.input_layernorm")
        yield f"{block}.ffn_norm.weight", read(f"{layer}.post_attention_layernorm")
        for part, name in PROJECTIONS.items():
            weight = read(f"{layer}.self_attn.{part}_proj")
            if part in num_heads:
                weight = as_pairs(weight, num_heads[part])
            yield f"{block}.{name}.weight", weight
        yield f"{block}.{GATE}.weight", read(f"{layer}.{MOE}.gate")
        for matrix, name in EXPERT_MATRICES.items():
            experts = [
                read(f"{layer}.{MOE}.experts.{expert}.{matrix}")
                for expert in range(config.num_local_experts)
            ]
            yield f"{block}.{name}.weight", torch.stack(experts)


def as_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return a projection's rows, [H·D, hidden], in the order of llama.cpp's rotation.

    transformers rotates a head's value j together with value j + D/2; llama.cpp rotates neighbours.
    """
    heads = weight.reshape(num_heads, 2, -1, weight.shape[1])  # [H, 2, D/2, hidden]
    return heads.transpose(1, 2).reshape(weight.shape).contiguous()
