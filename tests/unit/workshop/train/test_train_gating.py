"""Noisy top-k gating and its losses, against Shazeer et al. 2017.

T: tokens, E: experts, k: experts per token.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from workshop.train.gating import TrainingGate
from workshop.train.settings import GatingSettings


@given(seed=st.integers(0, 2**31), num_experts=st.integers(2, 9), data=st.data())
@settings(max_examples=30)
def test_the_weights_are_the_renormalised_softmax_that_mixtral_serves(
    seed: int, num_experts: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, num_experts - 1))
    config = MixtralConfig(hidden_size=6, num_local_experts=num_experts, num_experts_per_tok=k)
    generator = torch.Generator().manual_seed(seed)
    gating = GatingSettings(noisy=False, importance_weight=0.1, load_weight=0.0)
    gate = TrainingGate(config, gating, generator)
    gate.weight.data.normal_(generator=generator)
    logits, topk_weights, topk_ids = gate(torch.randn(20, 6, generator=generator))
    probabilities, expected_ids = logits.softmax(dim=-1).topk(k)
    assert torch.equal(topk_ids, expected_ids)
    torch.testing.assert_close(topk_weights, probabilities / probabilities.sum(-1, keepdim=True))


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
