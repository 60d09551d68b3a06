"""The mixture ``diabetes``: unlike regressors, each of which has a share of the patients."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from benchmarks.bundled.card import converted, filled, losses, table
from benchmarks.bundled.trained import Begin, Trained, is_held_out, trained
from experts.checkpoint.mixture import Mixture
from tests.local_mixture import LocalMixture
from workshop.estimators.estimators import MixtureOfExpertsRegressor

NUM_STEPS = 1
_NETWORK = MLPRegressor(
    hidden_layer_sizes=(8,), activation="tanh", solver="lbfgs", alpha=7.0, max_iter=1000
)
EXPERTS: list[tuple[str, Any]] = [
    ("svr", make_pipeline(StandardScaler(), SVR(C=30.0, gamma=0.05, epsilon=10.0))),
    (
        "mlp",
        make_pipeline(
            StandardScaler(), TransformedTargetRegressor(_NETWORK, transformer=StandardScaler())
        ),
    ),
    ("forest", RandomForestRegressor(50, min_samples_leaf=10, max_features=0.4)),
]
CHANGES = {
    "description": "The progression of diabetes within a year, from ten measurements: a mixture of "
    "a support vector regression, a network and a forest.",
    "inputs": [{"name": "patient", "datatype": "FP64", "shape": [10]}],
    "outputs": [
        {"name": "progression", "datatype": "FP64", "from": "value"},
        {"name": "weights", "datatype": "FP64", "from": "weights"},
    ],
}


def train(begin: Begin) -> Trained:
    """Fit the mixture."""
    begin("the experts and the gate")
    x, y = load_diabetes(return_X_y=True, scaled=False)
    held_out = is_held_out(len(x))
    fitted = MixtureOfExpertsRegressor(EXPERTS, random_state=0)
    fitted.fit(x[~held_out], y[~held_out])

    def card(mixture: Mixture, local: LocalMixture) -> str:
        test_x, test_y = converted(local, "patient", x[held_out]), y[held_out]
        outputs = local.predict({"patient": test_x})
        rows = [("this mixture", *_scores(test_y, outputs["progression"][:, 0]))]
        for name, expert in fitted.mixture_.experts.items():
            rows.append((f"one expert, `{name}`", *_scores(test_y, expert(test_x)[:, 0])))
        weights = outputs["weights"]
        names = list(mixture.spec.experts)
        parts = {
            "num_folds": fitted.cv,
            "num_held_out": len(test_y),
            "scores": table(("", "R²", "RMSE"), rows),
            "losses": losses(fitted, "Squared error / variance, out of fold"),
            "chosen": fitted.chosen_,
            "weights": table(
                ("Expert", "Mean weight", "Least", "Largest"),
                list(zip(names, weights.mean(0), weights.min(0), weights.max(0), strict=True)),
            ),
        }
        return filled("diabetes", mixture, local, {"patient": test_x[:1]}, parts)

    return trained(fitted, CHANGES, card)


def _scores(y: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    return r2_score(y, predicted), root_mean_squared_error(y, predicted)
