"""A fitted mixture's prediction and likelihood against torch, scipy and scikit-learn.

Dimension letters: N rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm

from cluster.errors import CheckpointError
from tests.unit.workshop.estimators.planted import (
    FEATURES,
    layers_of,
    recurrent_part,
    torch_rnn,
    tree,
)
from workshop.estimators.parts import (
    EstimatorPart,
    FittedMixture,
    GatePart,
    Layers,
    NetworkPart,
    RecurrentPart,
    posterior,
)

ROWS = np.random.default_rng(0).normal(size=(40, FEATURES))


def torch_mlp(
    rows: np.ndarray, layers: Layers, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    values = torch.from_numpy(rows)
    for place, (weight, bias) in enumerate(layers):
        values = torch.nn.functional.linear(values, torch.tensor(weight), torch.tensor(bias))
        if place < len(layers) - 1:
            values = activation(values)
    return values


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_gates_and_networks_are_those_of_torch(activation: str) -> None:
    layers = layers_of(np.random.default_rng(1), FEATURES, 4, 3)
    expected = torch_mlp(ROWS, layers, getattr(torch, activation))
    gate = GatePart(layers, ("a", "b", "c"), activation=activation)
    np.testing.assert_allclose(
        gate.log_weights(ROWS), torch.log_softmax(expected, 1), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(NetworkPart(layers, activation)(ROWS), expected, rtol=1e-12)
    linked = NetworkPart(layers, activation, "softmax")(ROWS)
    np.testing.assert_allclose(linked, torch.softmax(expected, 1), rtol=1e-12)


@pytest.mark.parametrize("cell", ["plain", "gru", "lstm"])
def test_a_recurrent_expert_is_that_of_torch(cell: str) -> None:
    torch.manual_seed(2)
    module = torch_rnn(cell)
    rows = np.random.default_rng(2).normal(size=(6, 5, FEATURES))
    with torch.no_grad():
        expected = module["head"](module["rnn"](torch.from_numpy(rows))[0][:, -1])
    part = recurrent_part(cell, module)
    np.testing.assert_allclose(part(rows), expected, rtol=1e-12, atol=1e-12)
    linked = recurrent_part(cell, module, "softmax")(rows)
    np.testing.assert_allclose(linked, torch.softmax(expected, 1), rtol=1e-12)


def test_a_recurrent_expert_refuses_tensors_of_no_use() -> None:
    part = recurrent_part("gru", torch_rnn("gru"))
    more = {**part.tensors, "rnn.weight_hh_l7": np.ones((12, 4))}
    with pytest.raises(CheckpointError, match=r"not used: rnn\.weight_hh_l7"):
        RecurrentPart("gru", more)(ROWS[:, None])


@pytest.mark.parametrize("pool", ["flatten", "mean", "last"])
def test_a_gate_pools_sequences(pool: str) -> None:
    rows = np.random.default_rng(3).normal(size=(7, 5, FEATURES))
    vectors = {"flatten": rows.reshape(7, -1), "mean": rows.mean(axis=1), "last": rows[:, -1]}[pool]
    layers = layers_of(np.random.default_rng(3), vectors.shape[1], 2)
    got = GatePart(layers, ("a", "b"), pool=pool).log_weights(rows)
    np.testing.assert_allclose(got, GatePart(layers, ("a", "b")).log_weights(vectors), rtol=1e-12)


def test_of_equal_scores_the_first_is_chosen() -> None:
    layers = ((np.zeros((4, FEATURES)), np.array([0.0, 2.0, 2.0, 2.0])),)
    weights = np.exp(GatePart(layers, tuple("abcd"), top_k=2).log_weights(ROWS[:1]))
    np.testing.assert_allclose(weights, [[0, 0.5, 0.5, 0]])


def test_a_tree_multiplies_the_weights_of_its_paths() -> None:
    mixture = tree(4)
    top = torch.softmax(torch_mlp(ROWS, mixture.gates["top"].layers, torch.tanh), 1).numpy()
    below = torch_mlp(ROWS, mixture.gates["below"].layers, torch.tanh).numpy()
    takes_a = below[:, 0] >= below[:, 1]
    expected = np.stack([top[:, 0] * takes_a, top[:, 0] * ~takes_a, top[:, 1]], axis=1)
    weights = np.exp(mixture.log_gates(ROWS))
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert 0 < takes_a.sum() < len(ROWS)
    outputs = mixture.outputs(ROWS)
    expected_values = sum(expected[:, [e]] * outputs[:, e] for e in range(3))
    np.testing.assert_allclose(mixture.combine(ROWS), expected_values, rtol=1e-12, atol=1e-12)


def test_an_expert_without_rows_computes_nothing() -> None:
    class Never:
        def predict(self, rows: np.ndarray) -> np.ndarray:
            raise AssertionError("computed")

    gate = GatePart(((np.zeros((2, FEATURES)), np.array([1.0, 0.0])),), ("a", "b"), top_k=1)
    experts = {
        "a": NetworkPart(layers_of(np.random.default_rng(5), FEATURES, 1)),
        "b": EstimatorPart(Never()),
    }
    mixture = FittedMixture("top", {"top": gate}, experts, "mean", (FEATURES,), 1)
    np.testing.assert_array_equal(mixture.combine(ROWS), experts["a"](ROWS))


def test_the_density_is_that_of_scipy() -> None:
    mixture = tree(6)
    targets = np.random.default_rng(6).normal(size=(len(ROWS), 2))
    outputs = mixture.outputs(ROWS)
    logs = norm.logpdf(targets[:, None], outputs, mixture.deviations).sum(axis=2)
    np.testing.assert_allclose(mixture.log_likelihoods(ROWS, targets), logs, rtol=1e-12)
    joint = np.exp(mixture.log_gates(ROWS)) * np.exp(logs)
    np.testing.assert_allclose(
        mixture.log_density(ROWS, targets), np.log(joint.sum(axis=1)), rtol=1e-9
    )
    got = posterior(mixture.log_gates(ROWS), mixture.log_likelihoods(ROWS, targets))
    np.testing.assert_allclose(got, joint / joint.sum(axis=1, keepdims=True), rtol=1e-9)


def test_the_floor_keeps_a_likelihood_that_adds_up_to_one() -> None:
    mixture = tree(7, kind="probabilities", width=3, floor=0.05)
    shares = [
        np.exp(mixture.log_likelihoods(ROWS, np.full(len(ROWS), place))) for place in range(3)
    ]
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-12)
    assert min(share.min() for share in shares) >= 0.05


def test_a_mixture_of_means_has_no_likelihood() -> None:
    mixture = tree(8, kind="mean", deviations=None)
    with pytest.raises(ValueError, match="no deviations"):
        mixture.log_likelihoods(ROWS, ROWS[:, :2])


def test_a_row_that_no_expert_can_make_keeps_the_gates_weights() -> None:
    log_gates = np.log([[0.25, 0.75], [0.5, 0.5]])
    got = posterior(log_gates, np.array([[-np.inf, -np.inf], [-np.inf, 0.0]]))
    np.testing.assert_allclose(got, [[0.25, 0.75], [0, 1]])
