"""The mixture ``hierarchy``: a tree of gates over linear regressions.

The data are linear on nine regions with noise of their own: three slabs of a cube, each cut into
three slabs in a direction of its own.

Dimension letter: T rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.neural_network import MLPRegressor
from sklearn.svm import SVR
from sklearn.tree import DecisionTreeRegressor

from benchmarks.bundled.card import converted, filled, table
from benchmarks.bundled.trained import Begin, Trained, is_held_out, trained
from experts.checkpoint.mixture import Mixture
from tests.local_mixture import LocalMixture
from workshop.estimators.estimators import HierarchicalMixtureRegressor

NUM_ROWS, NUM_FEATURES = 8000, 3
NUM_SLABS = 3
TOP_K = 2
NUM_STEPS = 2
BRANCHING = (4, 4)
SETTINGS: dict[str, Any] = {
    "top_k": TOP_K,
    "ridge": 0.01,
    "gate_ridge": 1e-3,
    "n_init": 16,
    "max_iter": 600,
    "tol": 2e-6,
    "random_state": 0,
}
DESCRIPTION = (
    "A function that is linear on nine regions, with its noise: a tree of gates over linear "
    "regressions."
)
SINGLES = {
    "one linear regression": LinearRegression(),
    "one SVR (C 100, gamma 10)": SVR(C=100.0, gamma=10.0),
    "one decision tree (10 rows a leaf)": DecisionTreeRegressor(
        min_samples_leaf=10, random_state=0
    ),
    "one MLP (two layers of 64)": MLPRegressor(
        hidden_layer_sizes=(64, 64), max_iter=1000, random_state=0
    ),
}


@dataclass(frozen=True, slots=True)
class Data:
    """Rows ``x`` [T, 3], targets ``y`` [T], and their means without noise [T]."""

    x: np.ndarray
    y: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def make_data(seed: int = 1) -> Data:
    """Draw the function and its rows."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (NUM_ROWS, NUM_FEATURES))
    slab = _slabs(x @ _direction(rng))
    region = np.empty(NUM_ROWS, np.int64)
    for number in range(NUM_SLABS):
        is_here = slab == number
        region[is_here] = NUM_SLABS * number + _slabs(x[is_here] @ _direction(rng))
    num_regions = NUM_SLABS**2
    slopes = 2 * rng.standard_normal((num_regions, NUM_FEATURES))
    levels = rng.uniform(-2, 2, num_regions)
    deviation = rng.uniform(0.05, 0.3, num_regions)[region]
    mean = (x * slopes[region]).sum(axis=1) + levels[region]
    return Data(x, mean + deviation * rng.standard_normal(NUM_ROWS), mean, deviation)


def _direction(rng: np.random.Generator) -> np.ndarray:
    direction = rng.standard_normal(NUM_FEATURES)
    unit: np.ndarray = direction / np.linalg.norm(direction)
    return unit


def _slabs(places: np.ndarray) -> np.ndarray:
    """Return the third, 0 to 2, to which each of the places belongs."""
    return np.searchsorted(np.quantile(places, (1 / 3, 2 / 3)), places)


def train(begin: Begin) -> Trained:
    """Fit the tree."""
    begin("the tree")
    data, held_out = make_data(), is_held_out(NUM_ROWS)
    train_x, train_y = data.x[~held_out], data.y[~held_out]
    tree = HierarchicalMixtureRegressor(BRANCHING, **SETTINGS).fit(train_x, train_y)

    def card(mixture: Mixture, local: LocalMixture) -> str:
        begin("the single estimators")
        test_x, test_y = converted(local, "x", data.x[held_out]), data.y[held_out]
        outputs = local.predict({"x": test_x, "y": test_y[:, None]})
        errors = test_y - data.mean[held_out]
        true_density = norm.logpdf(errors, scale=data.deviation[held_out]).mean()
        rows = [("this mixture", r2_score(test_y, outputs["mean"]), outputs["log_density"].mean())]
        for name, single in SINGLES.items():
            predicted = single.fit(train_x, train_y).predict(test_x)
            rows.append((name, r2_score(test_y, predicted), ""))
        rows.append(("the function itself", r2_score(test_y, data.mean[held_out]), true_density))
        parts = {
            "num_rows": len(train_x),
            "num_held_out": len(test_y),
            "num_branches": BRANCHING[0],
            "num_leaves": BRANCHING[1],
            "num_experts": math.prod(BRANCHING),
            "top_k": TOP_K,
            "num_computed": TOP_K ** len(BRANCHING),
            "num_starts": SETTINGS["n_init"],
            "settings": ", ".join(f"{key} {value:g}" for key, value in SETTINGS.items()),
            "num_iterations": tree.n_iter_,
            "scores": table(("", "R²", "Mean log density"), rows),
        }
        first = {"x": test_x[:1], "y": test_y[:1, None]}
        return filled("hierarchy", mixture, local, first, parts)

    return trained(tree, {"description": DESCRIPTION}, card)
