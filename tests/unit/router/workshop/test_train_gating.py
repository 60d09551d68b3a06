"""Noisy top-k gating and its losses, against Shazeer et al. 2017.

T: tokens, E: experts, k: experts per token.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from router.workshop.gating import (
    TrainingGate,
    dense_gates,
    load_probability,
    squared_variation,
    top_k_gates,
)
from router.workshop.settings import GatingSettings


@given(seed=st.integers(0, 2**31), num_experts=st.integers(2, 9), data=st.data())
@settings(max_examples=30)
def test_exactly_k_gates_are_nonzero_and_sum_to_one(
    seed: int, num_experts: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, num_experts - 1))
    logits = torch.randn(20, num_experts, generator=torch.Generator().manual_seed(seed))
    gates = dense_gates(*top_k_gates(logits, k), num_experts)
    assert (gates != 0).sum(dim=1).tolist() == [k] * 20
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(20))


def test_gates_are_the_renormalised_softmax_that_mixtral_serves() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    topk_weights, topk_ids = top_k_gates(logits, 2)
    probabilities, expected_ids = logits.softmax(dim=-1).topk(2)
    assert torch.equal(topk_ids, expected_ids)
    torch.testing.assert_close(topk_weights, probabilities / probabilities.sum(-1, keepdim=True))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_estimate_matches_monte_carlo(k: int) -> None:
    """Draw one expert's noise anew many times, the others' held, and count its selections."""
    num_experts, draws = 5, 20_000
    generator = torch.Generator().manual_seed(k)
    clean = torch.randn(1, num_experts, generator=generator)
    noise_std = torch.rand(1, num_experts, generator=generator) + 0.3
    noisy = clean + noise_std * torch.randn(1, num_experts, generator=generator)
    estimate = load_probability(clean, noisy, noise_std, k)[0].tolist()
    for expert_id in range(num_experts):
        redrawn = noisy.repeat(draws, 1)
        fresh = torch.randn(draws, generator=generator)
        redrawn[:, expert_id] = clean[0, expert_id] + noise_std[0, expert_id] * fresh
        is_chosen = (redrawn.topk(k, dim=-1).indices == expert_id).any(dim=-1)
        # 20,000 draws: a standard error of at most 0.0036.
        assert is_chosen.double().mean().item() == pytest.approx(estimate[expert_id], abs=0.015)


def test_balancing_loss_is_zero_only_when_uniform() -> None:
    assert squared_variation(torch.full((8,), 2.5)).item() == 0
    # Mean 1, variance 1 (half the experts take everything): CV squared is 1.
    assert squared_variation(torch.tensor([2.0, 0.0, 2.0, 0.0])).item() == pytest.approx(1)


def test_training_gate_adds_noise_while_training_only() -> None:
    """A skewed gate has a loss with gradients; in eval mode it is Mixtral's, bit by bit."""
    config = MixtralConfig(hidden_size=6, num_local_experts=4, num_experts_per_tok=2)
    gating = GatingSettings(noisy=True, importance_weight=0.1, load_weight=0.1)
    generator = torch.Generator().manual_seed(0)
    gate = TrainingGate(config, gating, generator)
    plain = MixtralTopKRouter(config)
    weight = torch.randn(4, 6, generator=generator)
    gate.weight.data.copy_(weight)
    plain.weight.data.copy_(weight)
    hidden_states = torch.randn(3, 10, 6, generator=generator) + 1
    first, second = gate(hidden_states), gate(hidden_states)
    assert not torch.equal(first[1], second[1])
    gradients = torch.autograd.grad(gate.balancing_loss, [gate.weight, gate.noise_weight])
    assert all(gradient.norm() > 0 for gradient in gradients)
    served = gate.eval()(hidden_states)
    for got, expected in zip(served, plain(hidden_states), strict=True):
        assert torch.equal(got, expected)
