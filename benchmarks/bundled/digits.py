"""The mixture ``digits``: the mean of three unlike classifiers of images of digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from benchmarks.bundled.card import converted, filled, losses, table
from benchmarks.bundled.trained import Begin, Trained, is_held_out, trained
from experts.checkpoint.mixture import Mixture
from tests.local_mixture import LocalMixture
from workshop.estimators.estimators import MixtureOfExpertsClassifier

NUM_STEPS = 1
EXPERTS: list[tuple[str, Any]] = [
    ("neighbours", KNeighborsClassifier(4, weights="distance")),
    ("gaussians", make_pipeline(PCA(20), QuadraticDiscriminantAnalysis(reg_param=0.1))),
    (
        "kernels",
        make_pipeline(
            Nystroem(gamma=0.001, n_components=150), LogisticRegression(C=100.0, max_iter=300)
        ),
    ),
]
MIN_PROBABILITY = 1e-6
"""Smaller ones count as this in a log loss, which is infinite at 0."""
CHANGES = {
    "description": "Handwritten digits, 8 by 8 pixels of 0 to 16: the mean of nearest neighbours, "
    "a quadratic discriminant and a regression on kernels.",
    "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [8, 8]}],
    "outputs": [
        {"name": "label", "datatype": "INT64", "from": "label"},
        {"name": "probabilities", "datatype": "FP32", "from": "probabilities"},
        {"name": "experts", "datatype": "INT64", "from": "experts"},
    ],
}


def train(begin: Begin) -> Trained:
    """Fit the mixture."""
    begin("the experts and the gate")
    x, y = load_digits(return_X_y=True)
    held_out = is_held_out(len(x))
    fitted = MixtureOfExpertsClassifier(EXPERTS, random_state=0)
    fitted.fit(x[~held_out], y[~held_out])

    def card(mixture: Mixture, local: LocalMixture) -> str:
        test_x, test_y = x[held_out], y[held_out]
        pixels = converted(local, "pixels", test_x)
        outputs = local.predict({"pixels": pixels})
        rows = [("this mixture", *_scores(test_y, outputs["probabilities"]))]
        for name, expert in fitted.mixture_.experts.items():
            rows.append((f"one expert, `{name}`", *_scores(test_y, expert(test_x))))
        parts = {
            "num_folds": fitted.cv,
            "num_held_out": len(test_y),
            "scores": table(("", "Accuracy", "Log loss"), rows),
            "losses": losses(fitted, "Squared error of the probabilities, out of fold"),
            "chosen": fitted.chosen_,
        }
        return filled("digits", mixture, local, {"pixels": pixels[:1]}, parts)

    return trained(fitted, CHANGES, card)


def _scores(y: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Return accuracy and log loss of probabilities [T, C] of rows T and classes C."""
    accuracy = accuracy_score(y, probabilities.argmax(axis=1))
    kept = np.maximum(probabilities, MIN_PROBABILITY)
    return accuracy, log_loss(y, kept / kept.sum(axis=1, keepdims=True))
