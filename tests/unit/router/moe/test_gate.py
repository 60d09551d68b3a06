"""The gate against two oracles: transformers' own, bit for bit, and numpy, a token at a time.

Dimension letters: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from experts.families.base import GateSpec
from experts.families.registry import FAMILIES
from router.moe.gate import Gate

H = 64
TheirGate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps hidden states [T, H] to weights and ids [T, K]."""


class GrokGate(nn.Module):
    """As xAI's code has it; transformers has no class of Grok."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok

    def forward(self, rows: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        shares = torch.softmax((rows @ self.weight.T).float(), dim=-1)
        weights, ids = torch.topk(shares, self.top_k)
        return None, weights.to(rows.dtype), ids


MODULES: dict[str, Any] = {
    "dbrx": DbrxFFN,
    "deepseek_v2": DeepseekV2TopkRouter,
    "deepseek_v3": DeepseekV3TopkRouter,
    "gpt_oss": GptOssTopKRouter,
    "grok-1": GrokGate,
    "grok": GrokGate,
    "mixtral": MixtralTopKRouter,
    "olmoe": OlmoeTopKRouter,
    "qwen2_moe": Qwen2MoeTopKRouter,
    "qwen3_moe": Qwen3MoeTopKRouter,
}


def dbrx(**experts: Any) -> dict[str, Any]:
    sizes = {"ffn_hidden_size": 8, "moe_num_experts": 16, "moe_top_k": 4, "hidden_size": H}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    outer = {"d_model": H, "n_heads": 4, "n_layers": 1, "max_seq_len": 9, "attn_config": attention}
    return outer | {"ffn_config": sizes | experts}


GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 6}
V2_GROUPS = GROUPS | {"topk_method": "group_limited_greedy"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("mixtral", {"num_local_experts": 64, "num_experts_per_tok": 8}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),
    *(
        (name, {"num_experts": 64, "num_experts_per_tok": 8} | more)
        for name in ("qwen2_moe", "qwen3_moe", "olmoe")
        for more in ({}, {"norm_topk_prob": True}, {"norm_topk_prob": False})
    ),
    ("dbrx", dbrx()),
    ("dbrx", dbrx(moe_normalize_expert_weights=2)),
    ("dbrx", dbrx(moe_normalize_expert_weights=None)),
    ("dbrx", dbrx(moe_top_k=7)),
    ("gpt_oss", {"num_local_experts": 32, "num_experts_per_tok": 4}),
    ("gpt_oss", {"num_local_experts": 128, "num_experts_per_tok": 1}),
    ("grok-1", {"num_experts": 8, "num_experts_per_tok": 2}),
    ("grok", {"num_experts": 8, "num_experts_per_tok": 2}),
    ("deepseek_v2", {"n_routed_experts": 64, "num_experts_per_tok": 6}),
    ("deepseek_v2", GROUPS | {"topk_method": "greedy"}),
    ("deepseek_v2", V2_GROUPS),
    ("deepseek_v2", V2_GROUPS | {"routed_scaling_factor": 16.0}),
    ("deepseek_v3", {"n_routed_experts": 256, "num_experts_per_tok": 8}),
    ("deepseek_v3", GROUPS),
    ("deepseek_v3", GROUPS | {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    ("deepseek_v3", GROUPS | {"n_group": 1, "topk_group": 1}),
    ("deepseek_v3", GROUPS | {"topk_group": 4}),
]


def matrix(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Return a matrix: of ``ties`` many products are equal, of ``huge`` most shares round to 0."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=generator).float()
    scale = {"random": 1.0, "huge": 60.0, "zero": 0.0}[kind]
    return torch.randn(shape, generator=generator) * scale


def both(
    name: str, config: dict[str, Any], kind: str, dtype: torch.dtype
) -> tuple[Gate, TheirGate, int]:
    """Return our gate and transformers', with the same parameters, and the number of experts."""
    family = FAMILIES[name]
    config = family.usual({"model_type": name, "hidden_size": H} | config)
    if MODULES[name] is GrokGate:
        their_config: Any = transformers.PreTrainedConfig(**config)
    else:
        their_config = transformers.AutoConfig.for_model(**family.transformers_config(config))
    theirs = MODULES[name](their_config).to(dtype).eval()
    module = theirs.router.layer if name == "dbrx" else theirs
    num_experts = len(module.weight)
    with_ties = "ties" if kind == "ties" else "random"
    module.weight.data = matrix(with_ties, (num_experts, H), 1).to(dtype)
    bias, correction = (getattr(module, n, None) for n in ("bias", "e_score_correction_bias"))
    for added in (bias, correction):
        if added is not None:
            added.data = matrix(kind, (1, num_experts), 2)[0].to(added.dtype)
    spec = family.gate(config)
    weight = module.weight.float() if "logits" in spec.float32 else module.weight
    logits_of = partial(functional.linear, weight=weight, bias=bias)
    ours = Gate(spec, config["num_experts_per_tok"], logits_of, correction)
    if name == "dbrx":
        return ours, lambda rows: theirs.route_tokens_to_experts(theirs.router(rows)), num_experts
    return ours, lambda rows: theirs(rows)[1:], num_experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "ties", "huge", "zero"])
@pytest.mark.parametrize(("name", "config"), CASES)
@torch.inference_mode()
def test_ids_and_weights_are_transformers_bit_for_bit(
    name: str, config: dict[str, Any], kind: str, dtype: torch.dtype
) -> None:
    ours, theirs, num_experts = both(name, config, kind, dtype)
    for num_tokens in (1, 2, 33):
        hidden_states = matrix(kind, (num_tokens, H), 3 + num_tokens).to(dtype)
        weights, ids = theirs(hidden_states)
        own_ids, own_weights = ours.choose(hidden_states)
        assert (own_ids.dtype, own_weights.dtype) == (ids.dtype, weights.dtype)
        assert torch.equal(own_ids, ids)
        assert torch.equal(own_weights, weights)
        if kind == "random":
            everyone = torch.ones(num_tokens, num_experts, dtype=torch.bool)
            masked = ours.choose(hidden_states, everyone)
            assert all(map(torch.equal, masked, (ids, weights))), "a mask that allows all"


def test_every_family_is_tried() -> None:
    assert {name for name, _ in CASES} == MODULES.keys() == FAMILIES.keys()


# Masks.


def softmax(values: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(values - values.max())
    return powers / powers.sum()


def oracle(
    spec: GateSpec, k: int, logits: np.ndarray, correction: np.ndarray, allowed: np.ndarray
) -> dict[int, float]:
    """Return the weight of each expert that a token gets, from logits [E] in float64."""
    line = np.flatnonzero(allowed)
    if not len(line):
        return {}
    scores = np.full(len(logits), -np.inf)
    if spec.score == "sigmoid":
        scores[line] = 1 / (1 + np.exp(-logits[line]))
    elif spec.score == "softmax_of_chosen":
        scores[line] = logits[line]
    elif spec.renormalises or spec.norm_exponent is not None:
        scores[line] = softmax(logits[line])
    else:
        scores = softmax(logits)
    ranks = scores + correction
    if len(line) > k:
        worst = correction.min() - 1
        groups = np.array_split(np.arange(len(logits)), spec.num_groups)
        best_sum = [
            sum(sorted(ranks[e] if allowed[e] else worst for e in group)[-spec.best_of_group :])
            for group in groups
        ]
        best = sorted(range(len(groups)), key=lambda g: -best_sum[g])[: spec.topk_groups]
        line = np.array([e for g in best for e in groups[g] if allowed[e]], dtype=np.int64)
    chosen = sorted(line, key=lambda e: -ranks[e])[:k]
    weights = scores[chosen]
    if spec.score == "softmax_of_chosen":
        weights = softmax(weights)
    if spec.norm_exponent is not None:
        weights = weights / np.linalg.norm(weights, spec.norm_exponent)
    if spec.renormalises:
        weights = weights / weights.sum()
    return {int(e): w * spec.scaling_factor for e, w in zip(chosen, weights, strict=True)}


@st.composite
def specs(draw: st.DrawFn) -> tuple[GateSpec, int, int]:
    """A family's kind of gate, the number of experts and the number that a token gets."""
    if draw(st.booleans()):
        num_experts = draw(st.integers(1, 12))
        top_k = draw(st.integers(1, num_experts))
        kinds: list[dict[str, Any]] = [
            {},
            {"renormalises": True},
            {"norm_exponent": draw(st.sampled_from([1.0, 2.0]))},
            {"score": "softmax_of_chosen"},
            {"score": "sigmoid", "renormalises": draw(st.booleans())},
        ]
        return GateSpec(**draw(st.sampled_from(kinds))), num_experts, top_k
    groups, best = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    size, chosen = draw(st.integers(best, 4)), draw(st.integers(1, groups))
    top_k = draw(st.integers(1, chosen * size))
    kinds = [{"score": "sigmoid", "renormalises": True}, {"score": "sigmoid"}, {}]
    spec = GateSpec(
        **draw(st.sampled_from(kinds)),
        scaling_factor=2.5,
        num_groups=groups,
        topk_groups=chosen,
        best_of_group=best,
        sorts=False,
    )
    return spec, groups * size, top_k


@settings(max_examples=300)
@given(specs(), st.integers(1, 9), st.floats(0, 1), st.integers(0, 9999))
def test_a_mask_leaves_what_the_oracle_leaves(
    drawn: tuple[GateSpec, int, int], num_tokens: int, share: float, seed: int
) -> None:
    spec, num_experts, top_k = drawn
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_tokens, num_experts))
    allowed = random.random(logits.shape) < share
    correction = random.normal(size=num_experts) * (spec.score == "sigmoid")
    gate = Gate(
        spec, top_k, lambda rows: rows, torch.from_numpy(correction) if correction.any() else None
    )
    ids, weights = gate.choose(torch.from_numpy(logits).float(), torch.from_numpy(allowed))
    for token in range(num_tokens):
        pairs = list(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert all(weight == 0 for e, weight in pairs if not allowed[token, e])
        expected = oracle(spec, top_k, logits[token], correction, allowed[token])
        got = {e: weight for e, weight in pairs if allowed[token, e]}
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["ties", "huge", "zero"])
@pytest.mark.parametrize(("name", "config"), CASES)
@torch.inference_mode()
def test_only_allowed_experts_have_weights_whatever_the_logits(
    name: str, config: dict[str, Any], kind: str
) -> None:
    ours, _, num_experts = both(name, config, kind, torch.bfloat16)
    hidden_states = matrix(kind, (40, H), 3).bfloat16()
    shares = torch.linspace(0, 1, 40).unsqueeze(1)
    allowed = torch.rand(40, num_experts, generator=torch.Generator().manual_seed(4)) < shares
    ids, weights = ours.choose(hidden_states, allowed)
    is_allowed = allowed.gather(1, ids)
    assert weights.isfinite().all()
    assert not weights[~is_allowed].any()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    if name not in ("deepseek_v2", "deepseek_v3"):  # the best groups may have fewer
        wanted = allowed.sum(1).clamp(max=ids.shape[1])
        assert torch.equal(is_allowed.sum(1), wanted)


def test_weights_of_the_others_stay_shares_where_one_expert_had_all() -> None:
    logits = torch.tensor([[300.0, 1.0, 2.0, 2.0]])
    allowed = torch.tensor([[False, True, True, True]])
    for spec in (GateSpec(renormalises=True), GateSpec(score="softmax_of_chosen")):
        ids, weights = Gate(spec, 2, lambda rows: rows).choose(logits, allowed)
        assert sorted(ids[0].tolist()) == [2, 3]
        assert weights.tolist() == [[0.5, 0.5]]


def test_what_is_no_number_stays_so() -> None:
    gate = Gate(GateSpec(renormalises=True), 2, lambda rows: rows)
    allowed = torch.tensor([[True, True, True, False]])
    _, weights = gate.choose(torch.full((1, 4), torch.nan), allowed)
    assert weights.isnan().any()
