"""The mixture ``hierarchy``: a tree of gates over linear regressions.

The data are linear on nine regions with noise of their own: three slabs of a cube, each cut into
three slabs in a direction of its own. :mod:`benchmarks.bundled.em` fits the tree.

Dimension letter: T rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.neural_network import MLPRegressor
from sklearn.svm import SVR
from sklearn.tree import DecisionTreeRegressor

from benchmarks.bundled.card import converted, filled, table
from benchmarks.bundled.em import NUM_BRANCHES, NUM_KEPT, NUM_LEAVES, NUM_STARTS, Tree, fit
from benchmarks.bundled.trained import Begin, Trained, is_held_out
from benchmarks.local_mixture import LocalMixture
from experts.checkpoint.mixture import Mixture
from router.workshop.mixture.weights import tensor_bytes

NUM_ROWS, NUM_FEATURES = 8000, 3
NUM_SLABS = 3
TOP_K = 2
NUM_STEPS = NUM_STARTS + NUM_KEPT + 1
MIXTURE, TRUTH = "this mixture", "the function itself"
BRANCHES = [f"branch{b}" for b in range(NUM_BRANCHES)]
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
    data, held_out = make_data(), is_held_out(NUM_ROWS)
    train_x, train_y = data.x[~held_out], data.y[~held_out]
    tree = fit(train_x, train_y, begin)
    files = {
        "gates.safetensors": tensor_bytes(_gate_tensors(tree), "float64"),
        "experts.safetensors": tensor_bytes(_expert_tensors(tree), "float64"),
    }

    def card(mixture: Mixture, local: LocalMixture) -> str:
        begin("the single estimators")
        inputs = {
            "x": converted(local, "x", data.x[held_out]),
            "y": converted(local, "y", data.y[held_out]),
        }
        test_y = data.y[held_out]
        outputs = local.predict(inputs)
        densities = {
            MIXTURE: outputs["log_density"].mean(),
            TRUTH: _normal_log_density(
                test_y - data.mean[held_out], data.deviation[held_out]
            ).mean(),
        }
        predicted = {MIXTURE: outputs["mean"][:, 0]}
        for name, single in SINGLES.items():
            predicted[name] = single.fit(train_x, train_y).predict(data.x[held_out])
        predicted[TRUTH] = data.mean[held_out]
        linear = next(iter(SINGLES))
        deviation = (train_y - SINGLES[linear].predict(train_x)).std()
        densities[linear] = _normal_log_density(test_y - predicted[linear], deviation).mean()
        parts = {
            "num_rows": len(train_x),
            "num_held_out": len(test_y),
            "num_branches": NUM_BRANCHES,
            "num_leaves": NUM_LEAVES,
            "num_experts": NUM_BRANCHES * NUM_LEAVES,
            "top_k": TOP_K,
            "num_computed": TOP_K**2,
            "num_starts": NUM_STARTS,
            "num_kept": NUM_KEPT,
            "scores": table(
                ("", "R²", "Mean log density"),
                [
                    (name, r2_score(test_y, values), densities.get(name, ""))
                    for name, values in predicted.items()
                ],
            ),
        }
        first = {name: array[:1] for name, array in inputs.items()}
        return filled("hierarchy", mixture, local, first, parts)

    return Trained(_spec(), files, card)


def _normal_log_density(errors: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    result: np.ndarray = -0.5 * (errors / deviation) ** 2 - np.log(deviation)
    return result - 0.5 * np.log(2 * np.pi)


def _leaf(branch: int, leaf: int) -> str:
    return f"linear{NUM_LEAVES * branch + leaf}"


def _gate_tensors(tree: Tree) -> dict[str, np.ndarray]:
    gates = {"root": tree.root, **dict(zip(BRANCHES, tree.branches, strict=True))}
    return {
        f"{name}.{part}": tensor
        for name, gate in gates.items()
        for part, tensor in (("weight", gate[:, :-1]), ("bias", gate[:, -1]))
    }


def _expert_tensors(tree: Tree) -> dict[str, np.ndarray]:
    """Return linear layers with two outputs: the mean, and a deviation without slope."""
    tensors = {}
    for branch in range(NUM_BRANCHES):
        for leaf in range(NUM_LEAVES):
            slopes, deviation = tree.slopes[branch, leaf], tree.deviations[branch, leaf]
            weight = np.stack([slopes[:-1], np.zeros(NUM_FEATURES)])
            tensors[f"{_leaf(branch, leaf)}.weight"] = weight
            tensors[f"{_leaf(branch, leaf)}.bias"] = np.array([slopes[-1], deviation])
    return tensors


def _spec() -> dict[str, Any]:
    leaves = [[_leaf(b, leaf) for leaf in range(NUM_LEAVES)] for b in range(NUM_BRANCHES)]
    gates = {"root": BRANCHES, **dict(zip(BRANCHES, leaves, strict=True))}
    return {
        "format": 1,
        "description": "A function that is linear on nine regions, with its noise: a tree of gates "
        "over linear regressions.",
        "dtype": "float64",
        "inputs": [
            {"name": "x", "datatype": "FP64", "shape": [NUM_FEATURES]},
            {"name": "y", "datatype": "FP64", "shape": [1]},
        ],
        "gate": "root",
        "gates": {
            name: {
                "kind": "linear",
                "file": "gates.safetensors",
                "prefix": f"{name}.",
                "top_k": TOP_K,
                "choices": choices,
            }
            for name, choices in gates.items()
        },
        "experts": {
            name: {"kind": "linear", "file": "experts.safetensors", "prefix": f"{name}."}
            for names in leaves
            for name in names
        },
        "combine": {"kind": "density", "dimensions": 1, "target": "y"},
        "outputs": [
            {"name": "mean", "datatype": "FP64", "from": "mean"},
            {"name": "variance", "datatype": "FP64", "from": "variance"},
            {"name": "log_density", "datatype": "FP64", "from": "log_density"},
            {"name": "experts", "datatype": "INT64", "from": "experts"},
            {"name": "weights", "datatype": "FP64", "from": "weights"},
        ],
    }
