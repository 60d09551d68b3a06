"""GPT-OSS (OpenAI 2025, arXiv 2508.10925): attention sinks, biases everywhere, clamped SwiGLU.

Dimension letters: E experts of a layer, I intermediate size, H hidden size.
"""

from __future__ import annotations

from functools import partial

from experts.families.base import Config, ExpertTensors, Family, GateSpec, Part, Shapes, head_sizes
from experts.families.common import layer_tensors, outer_tensors, routed_shape

_EVEN, _ODD = (0, 2), (1, 2)


def _expert_tensors(config: Config, layer_id: int, expert_id: int) -> ExpertTensors:
    """Rows of gate and up alternate in one stack; both stacks of matrices are transposed."""
    num_experts, hidden = config["num_local_experts"], config["hidden_size"]
    inner, prefix = config["intermediate_size"], f"model.layers.{layer_id}.mlp.experts"

    def matrix(name: str, *shape: int, every: tuple[int, int] | None = None) -> Part:
        rows = (expert_id, expert_id + 1)
        whole = (num_experts, *shape)
        return Part(f"{prefix}.{name}", whole, rows, True, transposed=True, every=every)

    def bias(name: str, length: int, every: tuple[int, int] | None = None) -> Part:
        rows = (expert_id, expert_id + 1)
        return Part(f"{prefix}.{name}", (num_experts, length), rows, True, every=every)

    return ExpertTensors(
        gate=matrix("gate_up_proj", hidden, 2 * inner, every=_EVEN),
        up=matrix("gate_up_proj", hidden, 2 * inner, every=_ODD),
        down=matrix("down_proj", inner, hidden),
        biases=(
            bias("gate_up_proj_bias", 2 * inner, _EVEN),
            bias("gate_up_proj_bias", 2 * inner, _ODD),
            bias("down_proj_bias", hidden),
        ),
    )


def _dense_tensors(config: Config) -> Shapes:
    tensors, bias = outer_tensors(config), config.get("attention_bias", True)
    heads, _, _ = head_sizes(config)
    for layer_id in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer_id}"
        tensors |= layer_tensors(config, layer_id, qkv_bias=bias, output_bias=bias)
        tensors[f"{prefix}.self_attn.sinks"] = (heads,)
        router = (config["num_local_experts"], config["hidden_size"])
        tensors[f"{prefix}.mlp.router.weight"] = router
        tensors[f"{prefix}.mlp.router.bias"] = router[:1]
    return tensors


GPT_OSS = Family(
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    experts_class="GptOssExperts",
    expert_shape=partial(
        routed_shape, num_experts="num_local_experts", activation="silu", has_biases=True
    ),
    expert_tensors=_expert_tensors,
    dense_tensors=_dense_tensors,
    gate=lambda _: GateSpec(score="softmax_of_chosen", float32=()),
    gate_module="router",
    stacks_experts=True,
    caps_scores=True,
    options={"hidden_act": ("silu",), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
)
