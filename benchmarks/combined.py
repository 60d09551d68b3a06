"""The bundled mixtures as one estimator each, in numpy and scikit-learn alone.

They are the plain way to the same predictions: :mod:`benchmarks.mixtures` calls them in one process
and has MLServer serve them. MLServer's environment has neither torch nor this project's packages,
so this module imports nothing of them until an estimator is built.

Dimension letters: T rows, F features, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

Layer = tuple[np.ndarray, np.ndarray]
"""The weight [W, F] and the bias [W]."""


class CombinedDigits(BaseEstimator):
    """A linear gate that gives each row to one classifier."""

    def __init__(self, gate: Layer, machines: Sequence[Any], num_classes: int) -> None:
        self.gate = gate
        self.machines = machines
        self.num_classes = num_classes

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Return the probabilities [T, C] of rows [T, 8, 8]."""
        weight, bias = self.gate
        rows = np.asarray(x).reshape(len(x), -1).astype(np.float32)
        chosen = (rows @ weight.T + bias).argmax(axis=1)
        result = np.zeros((len(rows), self.num_classes), np.float32)
        for expert_id in np.unique(chosen):
            members, machine = np.flatnonzero(chosen == expert_id), self.machines[expert_id]
            result[np.ix_(members, machine.classes_)] = machine.predict_proba(rows[members])
        return result


class CombinedDiabetes(BaseEstimator):
    """The weighted mean of two estimators and a network with one hidden layer."""

    def __init__(
        self, gate: Layer, estimators: Sequence[Any], network: tuple[Layer, Layer]
    ) -> None:
        self.gate = gate
        self.estimators = estimators
        self.network = network

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the values [T] of rows [T, F]."""
        rows = np.asarray(x)
        scores = rows @ self.gate[0].T + self.gate[1]
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        (weight, bias), (last_weight, last_bias) = self.network
        hidden = np.tanh(rows @ weight.T + bias)
        values = [estimator.predict(rows) for estimator in self.estimators]
        values.append((hidden @ last_weight.T + last_bias)[:, 0])
        total: np.ndarray = (shares * np.stack(values, axis=1)).sum(axis=1)
        return total / shares.sum(axis=1)


def combined_digits(folder: Path) -> CombinedDigits:
    """Return the bundled mixture ``digits`` as one estimator."""
    from safetensors.numpy import load_file

    gate = load_file(folder / "gate.safetensors")
    names = sorted(folder.glob("svm*.skops"))
    return CombinedDigits((gate["weight"], gate["bias"]), list(map(_estimator, names)), 10)


def combined_diabetes(folder: Path) -> CombinedDiabetes:
    """Return the bundled mixture ``diabetes`` as one estimator."""
    from safetensors.numpy import load_file

    gate, network = (load_file(folder / f"{name}.safetensors") for name in ("gate", "mlp"))
    first, last = ((network[f"{n}.weight"], network[f"{n}.bias"]) for n in range(2))
    estimators = [_estimator(folder / f"{name}.skops") for name in ("ridge", "svr")]
    return CombinedDiabetes((gate["weight"], gate["bias"]), estimators, (first, last))


def _estimator(file: Path) -> Any:
    """Load a file of this repository, whose types are therefore trusted."""
    from skops.io import get_untrusted_types, load

    return load(file, trusted=get_untrusted_types(file=file))
