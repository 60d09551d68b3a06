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
    biases = torch.randn(2 * inner).to(dtype), torch.randn(hidden).to(dtype)
    biased = GatedFfnWeights(weights.gate_up, weights.down, *biases)
    for num_rows in (1, 2, 33):
        rows = torch.randn(num_rows, hidden).to(dtype)
        got = results(TorchFfn(on_host(weights), name), rows)
        assert torch.equal(got, plain_ffn(rows, weights, ACTIVATIONS[name]))
        # That of gpt-oss has an activation of its own.
        assert torch.equal(
            results(TorchFfn(on_host(biased), name), rows), clamped_ffn(rows, biased)
        )
