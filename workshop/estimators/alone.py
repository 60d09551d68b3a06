"""A mixture beside its own experts: each fitted alone, to all rows, and the scores of all."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import accuracy_score, r2_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SINGLE = {"top_k": None, "noisy_gate": False, "importance_weight": 0.0, "load_weight": 0.0}
"""Parameters of a gate, as a single expert has them."""
MAX_ITER = 1000
LEAST_PROBABILITY = float(np.finfo(np.float64).eps)
"""A smaller probability counts as this, as in scikit-learn's log loss."""


def experts_alone(estimator: Any) -> dict[str, Any]:
    """Return the estimators, not fitted, that a mixture's experts are without a gate, by name.

    A mixture of given experts, pairs of a name and an estimator, has each of them. Other mixtures
    have experts of one kind, so one; recurrent experts of several cells have one for each cell.
    """
    parameters = estimator.get_params(deep=False)
    if not isinstance(parameters.get("experts", ""), str):
        return {f"{name} alone": clone(expert) for name, expert in estimator.experts}
    if "n_experts" in parameters:
        single = {name: value for name, value in SINGLE.items() if name in parameters}
        one = clone(estimator).set_params(n_experts=1, **single)
        name = f"one {estimator.experts} expert"
        cell = parameters.get("cell", "")
        if estimator.experts != "rnn" or isinstance(cell, str):
            return {name: one}
        return {f"{name}, {kind}": clone(one).set_params(cell=kind) for kind in dict.fromkeys(cell)}
    if is_classifier(estimator):
        return {
            "one linear expert": make_pipeline(
                StandardScaler(), LogisticRegression(max_iter=MAX_ITER)
            )
        }
    return {"one linear expert": LinearRegression()}


def score(fitted: Any, X: Any, targets: np.ndarray) -> dict[str, float | None]:
    """Return the quality of predictions for rows that no fit has seen, by metric.

    These are ``r2`` and ``rmse``, or ``accuracy`` and ``log_loss``, the mean negative log
    likelihood, which is ``None`` for a classifier without probabilities. A class that the
    classifier never saw is a miss.
    """
    predicted = fitted.predict(X)
    if not is_classifier(fitted):
        rmse = float(root_mean_squared_error(targets, predicted))
        return {"r2": float(r2_score(targets, predicted)), "rmse": rmse}
    accuracy = float(accuracy_score(targets, predicted))
    if not hasattr(fitted, "predict_proba"):
        return {"accuracy": accuracy, "log_loss": None}
    is_known = np.isin(targets, fitted.classes_)
    places = np.searchsorted(fitted.classes_, targets[is_known])
    likelihoods = np.zeros(len(targets))
    likelihoods[is_known] = fitted.predict_proba(X[is_known])[np.arange(len(places)), places]
    loss = -np.log(np.maximum(likelihoods, LEAST_PROBABILITY)).mean()
    return {"accuracy": accuracy, "log_loss": float(loss)}
