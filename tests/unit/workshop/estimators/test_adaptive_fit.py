"""The fit itself: records, seeds, processes, warm starts, early stopping, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss

from cluster.errors import NotFiniteError
from tests.unit.workshop.estimators.adaptive_data import absolute, quadrants, sequences
from workshop.estimators.estimators import AdaptiveMixtureClassifier, AdaptiveMixtureRegressor


def fitted(**parameters: Any) -> AdaptiveMixtureRegressor:
    x, y = absolute()
    return AdaptiveMixtureRegressor(**{"n_experts": 2, "random_state": 0, **parameters}).fit(x, y)


@pytest.mark.parametrize(
    "parameters",
    [
        {"experts": "linear"},
        {"experts": "mlp", "hidden_layer_sizes": (5, 3), "gate_hidden_layer_sizes": (4,)},
        {"experts": "mlp", "hidden_layer_sizes": (5,), "activation": "relu"},
        {"experts": "rnn", "hidden_layer_sizes": (3, 3), "cell": "gru"},
        {"experts": "rnn", "hidden_layer_sizes": (3,), "cell": "lstm", "pool": "flatten"},
        {"experts": "rnn", "hidden_layer_sizes": (3,), "cell": "plain", "pool": "last"},
        {"experts": "linear", "loss": "cooperative"},
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_fitted_parts_are_the_networks_for_raw_rows(parameters: dict[str, Any]) -> None:
    """The likelihood of the parts, far from standardised, equals that which the fit recorded."""
    x, y, _ = sequences(60)
    if parameters["experts"] != "rnn":
        x = x.reshape(60, -1)
    x = 1000 + 50 * x
    targets = np.column_stack([y * 1e3 - 1, y**2 / 1e3])
    mixture = AdaptiveMixtureRegressor(3, n_init=1, max_iter=15, random_state=0, **parameters)
    mixture.fit(x, targets)
    assert mixture.n_iter_ == len(mixture.log_likelihoods_)
    assert mixture.log_likelihood_ == pytest.approx(mixture.log_likelihoods_[-1], abs=1e-9)
    if mixture.loss == "cooperative":
        left = (targets - mixture.predict(x)) / targets.std(axis=0)
        deviation = np.sqrt(np.mean(left**2)) * targets.std(axis=0)
        expected = norm.logpdf(targets, mixture.predict(x), deviation).sum(axis=1).mean()
        assert mixture.log_likelihood_ == pytest.approx(expected, abs=1e-9)
        with pytest.raises(ValueError, match="no likelihood"):
            mixture.responsibilities(x, targets)


def test_a_sparse_gate_has_the_likelihood_of_the_sparse_mixture() -> None:
    x, y = quadrants(200)
    dense = AdaptiveMixtureRegressor(4, n_init=1, random_state=0).fit(x, y)
    sparse = AdaptiveMixtureRegressor(4, n_init=1, top_k=1, random_state=0).fit(x, y)
    assert ((sparse.responsibilities(x) > 0).sum(axis=1) == 1).all()
    assert sparse.mixture_.gates[sparse.mixture_.root].top_k == 1
    chosen = dense.responsibilities(x).argmax(axis=1)
    assert np.array_equal(sparse.responsibilities(x).argmax(axis=1), chosen)
    outputs = dense.mixture_.outputs(x)[np.arange(200), chosen, 0]
    np.testing.assert_allclose(sparse.predict(x), outputs, rtol=1e-12)
    expected = norm.logpdf(y, outputs, sparse.mixture_.deviations[chosen, 0]).mean()
    assert sparse.log_likelihood_ == pytest.approx(expected)
    assert sparse.log_likelihood_ != pytest.approx(sparse.log_likelihoods_[-1], abs=1e-6)


def test_the_same_seed_gives_the_same_bits_and_other_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    num_threads = torch.get_num_threads()
    settings: dict[str, Any] = {"noisy_gate": True, "n_experts": 3, "top_k": 2, "max_iter": 3}
    with pytest.warns(ConvergenceWarning):
        first, second, other = (
            fitted(random_state=seed, experts="mlp", **settings) for seed in (1, 1, 2)
        )
    x, _ = absolute()
    assert np.array_equal(first.predict(x), second.predict(x))
    assert not np.array_equal(first.predict(x), other.predict(x))
    assert torch.get_num_threads() == num_threads
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(drawn[0], torch.rand(3))
    assert np.array_equal(drawn[1], np.random.rand(3))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_processes_change_nothing_and_the_likeliest_start_is_kept() -> None:
    x, y = quadrants(120)
    settings: dict[str, Any] = {
        "n_experts": 3, "init": "random", "max_iter": 30, "random_state": 2,
    }  # fmt: skip
    fits = [AdaptiveMixtureRegressor(n_init=n, **settings).fit(x, y) for n in (1, 2, 3, 4)]
    reached = [fit.log_likelihood_ for fit in fits]
    assert np.all(np.diff(reached) >= 0)
    assert reached[0] < reached[1] < reached[3], "the second and the fourth start are better"
    there = AdaptiveMixtureRegressor(n_init=4, n_jobs=2, **settings).fit(x, y)
    assert np.array_equal(fits[3].predict(x), there.predict(x))
    assert np.array_equal(fits[3].log_likelihoods_, there.log_likelihoods_)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"experts": "mlp", "hidden_layer_sizes": (4,), "gate_hidden_layer_sizes": (3,)},
        {"deviation": "expert"},
        {"loss": "cooperative"},
    ],
)
def test_a_warm_start_goes_on_also_from_a_folder(
    parameters: dict[str, Any], tmp_path: Path
) -> None:
    x, y = absolute()
    settings: dict[str, Any] = {"n_experts": 2, "n_init": 1, "random_state": 0, **parameters}
    mixture = AdaptiveMixtureRegressor(max_iter=8, warm_start=True, **settings)
    with pytest.warns(ConvergenceWarning, match="max_iter=8"):
        mixture.fit(x, y)
    before = mixture.log_likelihood_
    mixture.save(tmp_path / "mixture")
    loaded = AdaptiveMixtureRegressor.load(tmp_path / "mixture")
    assert np.array_equal(loaded.predict(x), mixture.predict(x))
    for again in (mixture, loaded):
        again.set_params(max_iter=1, n_iter_no_change=1)
        with pytest.warns(ConvergenceWarning):
            again.fit(x, y)
        assert before < again.log_likelihood_ < before + 1
        assert again.n_iter_ == 1
    np.testing.assert_allclose(loaded.predict(x), mixture.predict(x), rtol=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_experts": 3}, "n_experts"),
        ({"experts": "mlp"}, "experts"),
        ({"gate_hidden_layer_sizes": (3,)}, "the gate"),
    ],
)
def test_a_warm_start_refuses_other_networks(changes: dict[str, Any], words: str) -> None:
    x, y = absolute()
    mixture = fitted(warm_start=True, max_iter=3).set_params(**changes)
    with pytest.raises(ValueError, match=f"warm_start: {words}"):
        mixture.fit(x, y)


def test_early_stopping_keeps_the_weights_that_are_best_for_other_rows() -> None:
    source = np.random.RandomState(0)
    x = source.randn(2080, 5)
    labels = (x[:, 0] + source.randn(2080) > 0).astype(int)
    settings: dict[str, Any] = {
        "experts": "mlp", "hidden_layer_sizes": (20,), "n_init": 1, "random_state": 0, "alpha": 0,
        "validation_fraction": 0.3,
    }  # fmt: skip
    whole, early = (
        AdaptiveMixtureClassifier(3, early_stopping=stops, **settings).fit(x[:80], labels[:80])
        for stops in (False, True)
    )
    assert early.n_iter_ < whole.n_iter_
    assert early.n_samples_fit_ == 56
    assert early.log_likelihood_ < early.log_likelihoods_[-1], "the last weights fit them closer"
    losses = [log_loss(labels[80:], mixture.predict_proba(x[80:])) for mixture in (early, whole)]
    assert losses[0] < losses[1]


def test_batches_and_adam() -> None:
    mixture = fitted(solver="adam", batch_size=32, learning_rate=0.05, max_iter=100, n_init=1)
    x, y = absolute()
    assert mixture.score(x, y) > 0.98
    assert mixture.n_iter_ < 100


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_a_loss_that_is_not_finite_stops_the_fit(solver: str) -> None:
    x, y = absolute(50)
    wild = {"learning_rate": 1e200} if solver == "adam" else {"importance_weight": 1e308}
    mixture = AdaptiveMixtureRegressor(2, solver=solver, random_state=0, **wild)
    with pytest.raises(NotFiniteError, match=r"the loss is (inf|nan) in iteration \d+"):
        mixture.fit(x, y * 1e3)
    assert not hasattr(mixture, "mixture_")


def test_a_mixture_that_meets_its_targets_exactly_has_a_bounded_likelihood() -> None:
    x = np.linspace(-1, 1, 41)[:, None]
    mixture = AdaptiveMixtureRegressor(2, deviation="expert", random_state=0).fit(x, np.abs(x))
    assert np.isfinite(mixture.log_likelihood_)
    assert mixture.mixture_.deviations.min() >= 0.999e-3 * np.abs(x).std()
    constant = AdaptiveMixtureRegressor(2, random_state=0).fit(x, np.full(41, 7.0))
    np.testing.assert_allclose(constant.predict(x), 7.0)
