"""Noisy top-k gating against Monte Carlo, hand-worked numbers and the definition of balance.

Dimension letters: N rows, E experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from workshop.estimators.adaptive.noisy_gate import (
    balancing_loss,
    chosen_probabilities,
    keep_top_k,
    noisy_scores,
    squared_variation,
)

N, E = 5, 6


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Return scores, raw deviations [N, E] and a generator."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(N, E, generator=generator, dtype=torch.float64)
    raw = torch.randn(N, E, generator=generator, dtype=torch.float64)
    return scores, raw, generator


@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_exactly_k_experts_have_weight(top_k: int) -> None:
    scores, raw, generator = drawn(top_k)
    noisy = noisy_scores(scores, raw, generator)
    weights = keep_top_k(noisy, top_k).softmax(dim=1)
    assert ((weights > 0).sum(dim=1) == top_k).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(N).double())
    largest = noisy.topk(top_k, dim=1).indices.sort(dim=1).values
    assert torch.equal((weights > 0).nonzero()[:, 1].reshape(N, top_k), largest)


def test_of_equal_scores_the_first_is_kept() -> None:
    kept = keep_top_k(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 2)
    assert kept.isfinite().tolist() == [[True, True, False, False]]


def test_the_noise_has_the_deviation_softplus_of_the_raw_one() -> None:
    scores, raw = torch.full((1, 2), 3.0).double(), torch.tensor([[-1.0, 2.0]]).double()
    generator = torch.Generator().manual_seed(0)
    many = noisy_scores(scores.expand(100_000, 2), raw.expand(100_000, 2), generator)
    torch.testing.assert_close(many.mean(dim=0), scores[0], atol=0.03, rtol=0)
    torch.testing.assert_close(many.std(dim=0), softplus(raw)[0], atol=0, rtol=0.01)


@pytest.mark.parametrize("top_k", [1, 2, E - 1])
def test_the_load_equals_monte_carlo(top_k: int) -> None:
    """Equation 8: new noise on one expert's score alone, the others' as they are."""
    scores, raw, generator = drawn(10 + top_k)
    noisy = noisy_scores(scores, raw, generator)
    probabilities = chosen_probabilities(scores, softplus(raw), noisy, top_k)
    draws = 20_000
    for expert in range(E):
        redrawn = noisy.repeat(draws, 1, 1)
        redrawn[:, :, expert] = noisy_scores(
            scores[:, expert].expand(draws, N), raw[:, expert].expand(draws, N), generator
        )
        is_chosen = keep_top_k(redrawn.reshape(-1, E), top_k).isfinite().reshape(draws, N, E)
        frequency = is_chosen[:, :, expert].double().mean(dim=0)
        torch.testing.assert_close(probabilities[:, expert], frequency, atol=0.015, rtol=0)


def test_the_load_loss_moves_the_score_of_an_expert_that_is_never_chosen() -> None:
    scores = torch.tensor([[0.0, 0.0, -3.0]] * 4).double().requires_grad_()
    raw, generator = torch.zeros(4, 3).double(), torch.Generator().manual_seed(0)
    noisy = noisy_scores(scores, raw, generator)
    weights = keep_top_k(noisy, 1).softmax(dim=1)
    assert (weights[:, 2] == 0).all()
    balancing_loss(
        chosen_probabilities(scores, softplus(raw), noisy, 1), torch.ones(4).double()
    ).backward()
    assert (scores.grad[:, 2] < 0).all(), "descent raises the score"
    assert np.isfinite(scores.grad.numpy()).all()


def test_the_balancing_losses_by_hand_and_0_where_experts_are_used_alike() -> None:
    """Sums 3, 1, 0: mean 4/3, variance (25 + 1 + 16) / 27, and so CV² 42/27 * 9/16 = 0.875."""
    weights = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.5, 0.5, 0]]).double()
    rows, ones = torch.tensor([1.0, 1, 2]).double(), torch.ones(E).double()
    assert balancing_loss(weights, rows).item() == pytest.approx(0.875)
    assert balancing_loss(torch.full((E, E), 1 / E).double(), ones) == pytest.approx(0, abs=1e-30)
    assert balancing_loss(torch.eye(E).double(), ones) == 0, "sparse, and yet balanced"
    assert squared_variation(torch.zeros(E)) == 0
