"""The expert's product by torch, where there is no native code: what transformers computes.

Dimension letters: P rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.ffn import ACTIVATIONS, Activation, TorchFfn, clamped_ffn
from tests.arrays import on_host, results


def plain_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """transformers' eager expert."""
    gate, up = functional.linear(rows, weights.gate_up).chunk(2, dim=-1)
    return functional.linear(act(gate) * up, weights.down)


def weights_of(hidden: int, inner: int, dtype: torch.dtype) -> GatedFfnWeights:
    torch.manual_seed(hidden)
    return GatedFfnWeights(
        torch.randn(2 * inner, hidden).to(dtype), torch.randn(hidden, inner).to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "inner"), [(16, 24), (64, 96)])
def test_without_native_code_an_expert_is_transformers_bit_for_bit(
    hidden: int, inner: int, name: str, dtype: torch.dtype
) -> None:
    weights = weights_of(hidden, inner, dtype)
    expert = TorchFfn(on_host(weights), name)
    for num_rows in (1, 2, 33):
        rows = torch.randn(num_rows, hidden).to(dtype)
        assert torch.equal(results(expert, rows), plain_ffn(rows, weights, ACTIVATIONS[name]))


def test_without_native_code_an_expert_with_biases_is_gpt_oss() -> None:
    plain = weights_of(16, 24, torch.float32)
    weights = GatedFfnWeights(plain.gate_up, plain.down, torch.randn(48), torch.randn(16))
    rows = torch.randn(5, 16)
    got = results(TorchFfn(on_host(weights), "relu"), rows)  # it has an activation of its own
    assert torch.equal(got, clamped_ffn(rows, weights))
    assert not torch.equal(got, plain_ffn(rows, plain, ACTIVATIONS["relu"]))
