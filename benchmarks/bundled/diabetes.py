"""The mixture ``diabetes``: unlike regressors, whose mean a gate weighs by the patient.

The gate is fitted to predictions of experts that have not seen the row (Wolpert 1992, "Stacked
generalization"), with a penalty that draws its weights to equal ones.

Dimension letters: T rows, F features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.model_selection import KFold, RepeatedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from torch import nn

from benchmarks.bundled.card import converted, filled, table
from benchmarks.bundled.trained import Begin, Trained, is_held_out, minimize
from benchmarks.local_mixture import LocalMixture
from experts.checkpoint.mixture import Mixture
from router.workshop.mixture.weights import estimator_bytes, tensor_bytes

GATE_FOLDS = 5
NUM_FOLDS, NUM_REPEATS = 5, 3
NUM_STEPS = 1 + NUM_FOLDS * NUM_REPEATS
RIDGE: dict[str, Any] = {"alpha": 20.0}
SVM: dict[str, Any] = {"kernel": "rbf", "C": 30.0, "gamma": 0.05, "epsilon": 10.0}
HIDDEN, MLP_DECAY, GATE_DECAY = 8, 0.02, 0.01
MIXTURE, PLAIN_MEAN = "this mixture", "its experts' plain mean"
NAMES = ("ridge", "svr", "mlp")
TITLES = ("one ridge regression", "one SVR", "one MLP")


class Mlp:
    """A network with one hidden layer, whose first and last layers take and give raw units."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> Mlp:
        """Fit standardised rows by L-BFGS with weight decay, from seeded weights."""
        mean, scale = x.mean(axis=0), x.std(axis=0)
        level, spread = y.mean(), y.std()
        rows = torch.from_numpy((x - mean) / scale)
        targets = torch.from_numpy((y - level) / spread)[:, None]
        torch.manual_seed(0)
        hidden = nn.Linear(x.shape[1], HIDDEN, dtype=torch.float64)
        output = nn.Linear(HIDDEN, 1, dtype=torch.float64)

        def loss() -> torch.Tensor:
            decay = (hidden.weight**2).sum() + (output.weight**2).sum()
            predicted = output(hidden(rows).tanh())
            return nn.functional.mse_loss(predicted, targets) + MLP_DECAY * decay

        minimize(loss, [*hidden.parameters(), *output.parameters()])
        first, last = (
            (layer.weight.detach().numpy(), layer.bias.detach().numpy())
            for layer in (hidden, output)
        )
        self._first = _on_raw(*first, mean, scale)
        self._last = spread * last[0], spread * last[1] + level
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return values [T]."""
        (weight, bias), (last_weight, last_bias) = self._first, self._last
        values: np.ndarray = np.tanh(x @ weight.T + bias) @ last_weight[0] + last_bias[0]
        return values

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the tensors of an expert of kind ``mlp``."""
        return {
            f"{layer}.{name}": tensor
            for layer, pair in enumerate((self._first, self._last))
            for name, tensor in zip(("weight", "bias"), pair, strict=True)
        }


def _on_raw(
    weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a layer on standardised rows as one on raw rows."""
    raw = weight / scale
    return raw, bias - raw @ mean


def ridge() -> Any:
    """Return a ridge regression on standardised rows, not fitted."""
    return make_pipeline(StandardScaler(), Ridge(**RIDGE))


def machine() -> Any:
    """Return a support vector regression on standardised rows, not fitted."""
    return make_pipeline(StandardScaler(), SVR(**SVM))


MAKERS: tuple[Callable[[], Any], ...] = (ridge, machine, Mlp)


class Mean:
    """The experts and the gate, fitted to rows ``x`` [T, F] and their values ``y`` [T]."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        """Fit the experts to all rows, and the gate to predictions of others for unseen rows."""
        unseen = np.empty((len(x), len(MAKERS)))  # [T, E]
        for fitted, other in KFold(GATE_FOLDS, shuffle=True, random_state=0).split(x):
            for expert_id, make in enumerate(MAKERS):
                expert = make().fit(x[fitted], y[fitted])
                unseen[other, expert_id] = expert.predict(x[other])
        self.gate = _fitted_gate(x, unseen, y)
        self.experts = [make().fit(x, y) for make in MAKERS]

    def predictions(self, x: np.ndarray) -> np.ndarray:
        """Return all experts' values [T, E]."""
        return np.stack([expert.predict(x) for expert in self.experts], axis=1)

    def weights(self, x: np.ndarray) -> np.ndarray:
        """Return the gate's weights [T, E]."""
        weight, bias = self.gate
        return torch.from_numpy(x @ weight.T + bias).softmax(dim=1).numpy()


def _fitted_gate(
    x: np.ndarray, predictions: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [E, F] and bias [E] of the gate, for raw rows."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    rows = torch.from_numpy((x - mean) / scale)
    errors = torch.from_numpy((predictions - y[:, None]) / y.std())  # [T, E]
    weight = torch.zeros(len(MAKERS), x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(MAKERS), dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        weights = (rows @ weight.T + bias).softmax(dim=1)
        decay = (weight**2).sum() + (bias**2).sum()
        return ((weights * errors).sum(dim=1) ** 2).mean() + GATE_DECAY * decay

    minimize(loss, [weight, bias])
    return _on_raw(weight.detach().numpy(), bias.detach().numpy(), mean, scale)


def train(begin: Begin) -> Trained:
    """Fit the mixture."""
    begin("the experts and the gate")
    x, y = load_diabetes(return_X_y=True, scaled=False)
    held_out = is_held_out(len(x))
    train_x, train_y = x[~held_out], y[~held_out]
    fitted = Mean(train_x, train_y)
    weight, bias = fitted.gate
    files = {"gate.safetensors": tensor_bytes({"weight": weight, "bias": bias}, "float64")}
    files |= {f"{NAMES[i]}.skops": estimator_bytes(fitted.experts[i]) for i in range(2)}
    files["mlp.safetensors"] = tensor_bytes(fitted.experts[2].tensors(), "float64")

    def card(mixture: Mixture, local: LocalMixture) -> str:
        crossed = _cross_validated(train_x, train_y, begin)
        test_x, test_y = converted(local, "patient", x[held_out]), y[held_out]
        outputs = local.predict({"patient": test_x})
        alone = fitted.predictions(test_x)
        predicted = {
            MIXTURE: outputs["progression"][:, 0],
            PLAIN_MEAN: alone.mean(axis=1),
            **dict(zip(TITLES, alone.T, strict=True)),
        }
        weights = outputs["weights"]
        parts = {
            "ridge": _listed(RIDGE),
            "svr": _listed(SVM),
            "hidden": HIDDEN,
            "gate_folds": GATE_FOLDS,
            "num_folds": NUM_FOLDS,
            "num_repeats": NUM_REPEATS,
            "num_held_out": len(test_y),
            "scores": table(
                ("", "R²", "RMSE", "R², folds", "RMSE, folds"),
                [
                    (name, *_scores(test_y, values), *crossed[name])
                    for name, values in predicted.items()
                ],
            ),
            "weights": table(
                ("Expert", "Mean weight", "Least", "Largest"),
                list(zip(NAMES, weights.mean(0), weights.min(0), weights.max(0), strict=True)),
            ),
        }
        return filled("diabetes", mixture, local, {"patient": test_x[:1]}, parts)

    return Trained(_spec(), files, card)


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _scores(y: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    return r2_score(y, predicted), root_mean_squared_error(y, predicted)


def _cross_validated(x: np.ndarray, y: np.ndarray, begin: Begin) -> dict[str, tuple[float, float]]:
    """Return the mean scores over repeated folds of the training rows."""
    found: dict[str, list[tuple[float, float]]] = {}
    folds = RepeatedKFold(n_splits=NUM_FOLDS, n_repeats=NUM_REPEATS, random_state=0)
    for number, (seen, other) in enumerate(folds.split(x)):
        begin(f"fold {number + 1} of {NUM_FOLDS * NUM_REPEATS}")
        fitted = Mean(x[seen], y[seen])
        alone = fitted.predictions(x[other])
        predicted = {
            MIXTURE: (fitted.weights(x[other]) * alone).sum(axis=1),
            PLAIN_MEAN: alone.mean(axis=1),
            **dict(zip(TITLES, alone.T, strict=True)),
        }
        for name, values in predicted.items():
            found.setdefault(name, []).append(_scores(y[other], values))
    return {name: tuple(np.mean(scores, axis=0)) for name, scores in found.items()}


def _spec() -> dict[str, Any]:
    return {
        "format": 1,
        "description": "The progression of diabetes within a year, from ten measurements: the mean "
        "of a ridge regression, a support vector regression and a network, weighed by the patient.",
        "dtype": "float64",
        "inputs": [{"name": "patient", "datatype": "FP64", "shape": [10]}],
        "gate": "trust",
        "gates": {"trust": {"kind": "linear", "file": "gate.safetensors", "choices": list(NAMES)}},
        "experts": {
            "ridge": {"kind": "sklearn", "file": "ridge.skops"},
            "svr": {"kind": "sklearn", "file": "svr.skops"},
            "mlp": {"kind": "mlp", "file": "mlp.safetensors", "activation": "tanh"},
        },
        "combine": {"kind": "mean", "shape": [1]},
        "outputs": [
            {"name": "progression", "datatype": "FP64", "from": "value"},
            {"name": "weights", "datatype": "FP64", "from": "weights"},
        ],
    }
