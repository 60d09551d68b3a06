"""The losses of 1991 against their formulas, and their gradients by autograd against the paper's.

Dimension letters: N rows, E experts, W outputs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import norm

from workshop.estimators.adaptive.loss import (
    class_log_likelihoods,
    competitive_losses,
    cooperative_losses,
    normal_log_likelihoods,
)

N, E, W = 7, 4, 3


@pytest.fixture(params=range(3))
def source(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


def leaf(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).requires_grad_()


def test_the_likelihood_form_for_classes(source: np.random.Generator) -> None:
    """The loss is -log sum p P(c); an expert's scores have the gradient -h (one hot - P)."""
    scores, classes = source.normal(size=(N, E)), source.integers(W, size=N)
    o = leaf(source.normal(size=(N, E, W)))
    log_gates = torch.from_numpy(scores).log_softmax(dim=1)
    losses = competitive_losses(log_gates, class_log_likelihoods(o, torch.from_numpy(classes)))
    losses.sum().backward()
    probabilities = softmax(o.detach().numpy(), axis=2)
    shares = softmax(scores, axis=1) * probabilities[np.arange(N), :, classes]
    np.testing.assert_allclose(losses.detach(), -np.log(shares.sum(axis=1)), rtol=1e-12)
    h = shares / shares.sum(axis=1, keepdims=True)
    wanted = -h[:, :, None] * (np.eye(W)[classes][:, None] - probabilities)
    np.testing.assert_allclose(o.grad, wanted, rtol=1e-10, atol=1e-14)


def test_the_cooperative_error_and_its_gradient(source: np.random.Generator) -> None:
    """Equations 1.1 and 1.4 but for the factor 2: an expert's gradient has the others' error."""
    scores, d = source.normal(size=(N, E)), source.normal(size=(N, W))
    o = leaf(source.normal(size=(N, E, W)))
    losses = cooperative_losses(torch.from_numpy(scores).log_softmax(dim=1), o, torch.from_numpy(d))
    losses.sum().backward()
    p = softmax(scores, axis=1)
    left = d - (p[:, :, None] * o.detach().numpy()).sum(axis=1)
    np.testing.assert_allclose(losses.detach(), (left**2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(o.grad, -2 * p[:, :, None] * left[:, None], rtol=1e-10, atol=1e-14)


def test_an_expert_that_is_not_chosen_has_no_gradient() -> None:
    o = leaf(np.array([[[1.0], [2.0], [3.0]]]))
    log_gates = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    targets = torch.tensor([[2.5]], dtype=torch.float64)
    likelihoods = normal_log_likelihoods(o, targets, torch.ones(3, 1).double())
    competitive_losses(log_gates, likelihoods).sum().backward()
    assert o.grad[0, 2, 0] == 0
    assert (o.grad[0, :2, 0] < 0).all()


def test_the_competitive_error_and_its_gradient_are_the_papers(source: np.random.Generator) -> None:
    """Equations 1.3 and 1.5: E = -log sum p N(d; o, s), dE/do = -h (d - o) / s²."""
    scores, d = source.normal(size=(N, E)), source.normal(size=(N, W))
    deviations = source.uniform(0.3, 2, size=(E, W))
    o = leaf(source.normal(size=(N, E, W)))
    log_gates = torch.from_numpy(scores).log_softmax(dim=1)
    likelihoods = normal_log_likelihoods(o, torch.from_numpy(d), torch.from_numpy(deviations))
    expected = norm.logpdf(d[:, None], o.detach().numpy(), deviations).sum(axis=2)
    np.testing.assert_allclose(likelihoods.detach(), expected, rtol=1e-12)
    losses = competitive_losses(log_gates, likelihoods)
    losses.sum().backward()
    joint = np.log(softmax(scores, axis=1)) + expected
    np.testing.assert_allclose(losses.detach(), -np.log(np.exp(joint).sum(axis=1)), rtol=1e-12)
    h = softmax(joint, axis=1)
    wanted = -h[:, :, None] * (d[:, None] - o.detach().numpy()) / deviations**2
    np.testing.assert_allclose(o.grad, wanted, rtol=1e-10, atol=1e-14)
