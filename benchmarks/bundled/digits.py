"""The mixture ``digits``: support vector machines, each for a region of the images of digits.

k-means finds the regions, and a logistic regression learns to tell them apart: it is the gate. An
expert is fitted to the rows for which its region is among the gate's likeliest, so that it knows
what lies beyond its borders. A row is then given to one expert alone. After Collobert, Bengio and
Bengio 2002, "A parallel mixture of SVMs for very large scale problems".

Dimension letters: T rows, E experts, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from benchmarks.bundled.card import converted, filled, table
from benchmarks.bundled.trained import Begin, Trained, is_held_out
from benchmarks.local_mixture import LocalMixture
from experts.checkpoint.mixture import Mixture
from router.workshop.mixture.weights import estimator_bytes, tensor_bytes

NUM_FOLDS = 5
NUM_STEPS = NUM_FOLDS + 1
NUM_EXPERTS = 8
FITTED_REGIONS = 3
"""A row is fitted by the experts of so many of its likeliest regions."""
CALIBRATION_FOLDS = 5
"""An expert knows the classes of which it has at least as many rows."""
GATE_C = 0.01
SVM: dict[str, Any] = {"kernel": "rbf", "C": 10.0, "gamma": 0.001}
CLASSES = list(range(10))
NAMES = [f"svm{number}" for number in range(NUM_EXPERTS)]
MIXTURE, SINGLE, LINEAR = "this mixture", "one SVM", "one logistic regression"
_SCORE_COLUMNS = (
    "", "Accuracy", "Log loss", "Accuracy, folds", "Log loss, folds", "Support vectors",
)  # fmt: skip
LEAST_PROBABILITY = 1e-6
"""Smaller ones count as this in a log loss, which is infinite at 0."""


def train(begin: Begin) -> Trained:
    """Fit the mixture, and one machine and one logistic regression beside it."""
    x, y = load_digits(return_X_y=True)
    held_out = is_held_out(len(x))
    train_x, train_y = x[~held_out], y[~held_out]
    begin("the experts")
    regions = Regions(train_x, train_y)
    single, linear = machine(train_x, train_y), logistic(train_x, train_y)

    def card(mixture: Mixture, local: LocalMixture) -> str:
        crossed = _cross_validated(train_x, train_y, begin)
        test_x, test_y = converted(local, "pixels", x[held_out]), y[held_out]
        outputs = local.predict({"pixels": test_x})
        scores = {
            MIXTURE: _scores(test_y, outputs["probabilities"]),
            SINGLE: _scores(test_y, single.predict_proba(x[held_out])),
            LINEAR: _scores(test_y, linear.predict_proba(x[held_out])),
        }
        asked = outputs["experts"][:, 0]
        vectors = {
            MIXTURE: round(np.take(regions.num_vectors, asked).mean()),
            SINGLE: num_vectors(single),
        }
        counts = np.bincount(asked, minlength=NUM_EXPERTS)
        parts = {
            "num_experts": NUM_EXPERTS,
            "num_folds": NUM_FOLDS,
            "gate_c": GATE_C,
            "fitted_regions": FITTED_REGIONS,
            "calibration_folds": CALIBRATION_FOLDS,
            "svm": ", ".join(f"{key} {value}" for key, value in SVM.items()),
            "scores": table(
                _SCORE_COLUMNS,
                [(name, *scores[name], *crossed[name], vectors.get(name, "")) for name in scores],
            ),
            "experts": table(
                ("Expert", "Images that it is fitted to", "Support vectors", "Held-out images"),
                list(zip(NAMES, regions.num_rows, regions.num_vectors, counts, strict=True)),
            ),
        }
        return filled("digits", mixture, local, {"pixels": test_x[:1]}, parts)

    files = {"gate.safetensors": tensor_bytes(regions.gate_tensors(), "float32")}
    files |= {f"{n}.skops": estimator_bytes(e) for n, e in zip(NAMES, regions.experts, strict=True)}
    return Trained(_spec(), files, card)


def machine(x: np.ndarray, y: np.ndarray) -> CalibratedClassifierCV:
    """Return a support vector machine with probabilities (Platt 1999), fitted to all rows.

    Rows of classes with fewer than :data:`CALIBRATION_FOLDS` rows are left out.
    """
    is_enough = np.bincount(y, minlength=len(CLASSES))[y] >= CALIBRATION_FOLDS
    folds = StratifiedKFold(CALIBRATION_FOLDS)
    calibrated = CalibratedClassifierCV(SVC(**SVM), ensemble=False, cv=folds)
    return calibrated.fit(x[is_enough], y[is_enough])


def logistic(x: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """Return a logistic regression as that of the gate."""
    return LogisticRegression(C=GATE_C, max_iter=2000).fit(x, y)


def num_vectors(fitted: CalibratedClassifierCV) -> int:
    """Return the number of support vectors, with each of which a row is compared."""
    return len(fitted.calibrated_classifiers_[0].estimator.support_)


class Regions:
    """The gate and the experts, fitted to rows ``x`` [T, 64] and their classes [T]."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        """Find the regions and fit all experts."""
        regions = KMeans(NUM_EXPERTS, n_init=10, random_state=0).fit_predict(x)
        self._gate = logistic(x, regions)
        order = np.argsort(-self._gate.decision_function(x), axis=1, kind="stable")
        likeliest = order[:, :FITTED_REGIONS]  # [T, fitted regions]
        self.num_rows: list[int] = []
        self.experts: list[CalibratedClassifierCV] = []
        for expert_id in range(NUM_EXPERTS):
            is_here = (likeliest == expert_id).any(axis=1)
            self.num_rows.append(int(is_here.sum()))
            self.experts.append(machine(x[is_here], y[is_here]))
        self.num_vectors = [num_vectors(expert) for expert in self.experts]

    def gate_tensors(self) -> dict[str, np.ndarray]:
        """Return the tensors of a linear gate."""
        return {"weight": self._gate.coef_, "bias": self._gate.intercept_}

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Return the probabilities [T, C] of rows, each by its one expert."""
        chosen = self._gate.decision_function(x).argmax(axis=1)
        result = np.zeros((len(x), len(CLASSES)))
        for expert_id in np.unique(chosen):
            rows, expert = np.flatnonzero(chosen == expert_id), self.experts[expert_id]
            result[np.ix_(rows, expert.classes_)] = expert.predict_proba(x[rows])
        return result


def _scores(y: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Return accuracy and log loss of probabilities [T, C]."""
    accuracy = accuracy_score(y, probabilities.argmax(axis=1))
    kept = np.maximum(probabilities, LEAST_PROBABILITY)
    return accuracy, log_loss(y, kept / kept.sum(axis=1, keepdims=True), labels=CLASSES)


def _cross_validated(x: np.ndarray, y: np.ndarray, begin: Begin) -> dict[str, tuple[float, float]]:
    """Return the mean scores over folds of the training rows."""
    found: dict[str, list[tuple[float, float]]] = {}
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    for number, (fitted, tested) in enumerate(folds.split(x, y)):
        begin(f"fold {number + 1} of {NUM_FOLDS}")
        some_x, some_y = x[fitted], y[fitted]
        predictors = {
            MIXTURE: Regions(some_x, some_y).probabilities,
            SINGLE: machine(some_x, some_y).predict_proba,
            LINEAR: logistic(some_x, some_y).predict_proba,
        }
        for name, predict in predictors.items():
            found.setdefault(name, []).append(_scores(y[tested], predict(x[tested])))
    return {name: tuple(np.mean(scores, axis=0)) for name, scores in found.items()}


def _spec() -> dict[str, Any]:
    experts = {
        name: {"kind": "sklearn", "file": f"{name}.skops", "method": "predict_proba"}
        for name in NAMES
    }
    return {
        "format": 1,
        "description": "Handwritten digits, 8 by 8 pixels of 0 to 16: a support vector machine for "
        "each region of images, of which a linear gate chooses one.",
        "dtype": "float32",
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [8, 8]}],
        "gate": "region",
        "gates": {
            "region": {"kind": "linear", "file": "gate.safetensors", "top_k": 1, "choices": NAMES}
        },
        "experts": experts,
        "combine": {"kind": "probabilities", "classes": CLASSES},
        "outputs": [
            {"name": "label", "datatype": "INT64", "from": "label"},
            {"name": "probabilities", "datatype": "FP32", "from": "probabilities"},
            {"name": "experts", "datatype": "INT64", "from": "experts"},
        ],
    }
