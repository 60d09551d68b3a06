"""The native gate against torch's (router/moe/gate.py), and by itself.

Dimension letters: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from cluster.native import native
from experts.families.base import GateSpec
from router.model.cpu.native_layer import NativeGate, can_choose
from router.moe.gate import Gate

assert native is not None
NUM_EXPERTS, TOP_K, SIZE = 16, 4, 48

SPECS = {
    "mixtral": GateSpec(renormalises=True),
    "olmoe": GateSpec(),
    "gpt_oss": GateSpec(score="softmax_of_chosen", float32=()),
    "dbrx": GateSpec(norm_exponent=1.0, float32=()),
    "deepseek_v2": GateSpec(
        num_groups=4, topk_groups=2, scaling_factor=16.0, float32=("logits", "scores", "weights")
    ),
    "deepseek_v3": GateSpec(
        score="sigmoid",
        renormalises=True,
        scaling_factor=2.5,
        num_groups=4,
        topk_groups=2,
        best_of_group=2,
        float32=("logits", "scores", "weights"),
        sorts=False,
    ),
}


def gates(name: str, dtype: torch.dtype, seed: int) -> tuple[NativeGate, Gate, torch.Tensor]:
    """Return both gates with one weight, and hidden states [T, H]."""
    generator = torch.Generator().manual_seed(seed)
    spec = SPECS[name]
    weight = (0.3 * torch.randn(NUM_EXPERTS, SIZE, generator=generator)).to(dtype)
    bias = torch.randn(NUM_EXPERTS, generator=generator).to(dtype) if name == "gpt_oss" else None
    correction = 0.1 * torch.randn(NUM_EXPERTS, generator=generator) if "v3" in name else None
    wide = [None if part is None else part.double() for part in (weight, bias)]
    logits_of = partial(functional.linear, weight=wide[0], bias=wide[1])
    oracle = Gate(spec, TOP_K, lambda rows: logits_of(rows.double()).float(), correction)
    native_gate = NativeGate(spec, TOP_K, weight, bias, correction)
    return native_gate, oracle, torch.randn(150, SIZE, generator=generator).to(dtype)


def spread(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), NUM_EXPERTS).scatter_(1, ids, weights.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), masked=st.booleans())
def test_it_chooses_and_weighs_as_torch_does(
    name: str, dtype: torch.dtype, seed: int, masked: bool
) -> None:
    gate, oracle, rows = gates(name, dtype, seed)
    allowed = None
    if masked:
        generator = torch.Generator().manual_seed(seed)
        allowed = torch.rand(len(rows), NUM_EXPERTS, generator=generator) < 0.7
        allowed[0] = False
        allowed[1] = torch.arange(NUM_EXPERTS) == 3
    ids, weights = gate.choose(rows, allowed)
    expected_ids, expected_weights = oracle.choose(rows, allowed)
    assert ids.dtype == torch.int64
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    wide = name.startswith("deepseek") or (SPECS[name].float32 and "weights" in SPECS[name].float32)
    assert weights.dtype == (torch.float32 if wide else dtype)
    rounding = 2.0**-20 if weights.dtype == torch.float32 else 2.0**-8
    difference = spread(ids, weights) - spread(expected_ids, expected_weights)
    assert difference.abs().max() <= rounding * SPECS[name].scaling_factor
    if allowed is not None:
        assert (spread(ids, weights)[~allowed] == 0).all()


def test_of_equal_scores_the_lower_id_comes_first() -> None:
    gate = NativeGate(GateSpec(renormalises=True), 3, torch.zeros(8, 4), None)
    ids, weights = gate.choose(torch.ones(2, 4))
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("name", SPECS)
def test_what_is_no_number_shows_in_its_own_weights(name: str) -> None:
    gate, _, rows = gates(name, torch.float32, 2)
    clean_ids, clean_weights = gate.choose(rows)
    rows[7, 3] = torch.nan
    ids, weights = gate.choose(rows)
    others = torch.arange(len(rows)) != 7
    assert torch.equal(ids[others], clean_ids[others])
    assert torch.equal(weights[others], clean_weights[others])
    assert weights[7].isnan().any()
    assert ((ids[7] >= 0) & (ids[7] < NUM_EXPERTS)).all()


def test_a_norm_of_another_exponent_and_other_devices_stay_with_torch() -> None:
    weight = torch.ones(4, 4)
    assert can_choose(GateSpec(norm_exponent=1.0), weight)
    assert not can_choose(GateSpec(norm_exponent=2.0), weight)
    assert not can_choose(GateSpec(), weight.double())
    assert not can_choose(GateSpec(), weight.to("meta"))
