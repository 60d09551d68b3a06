"""The bundled mixtures as one estimator each, in numpy and scikit-learn alone.

They are the plain way to the same predictions: :mod:`benchmarks.mixtures` calls them in one process
and has MLServer serve them. MLServer's environment has neither torch nor this project's packages,
so this module imports nothing of them until an estimator is built.

Dimension letters: T rows, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

Layer = tuple[np.ndarray, np.ndarray]
"""The weight [W, F] and the bias [W]."""


class Combined(BaseEstimator):
    """The mean of estimators, whose weights a linear gate gives."""

    def __init__(self, gate: Layer, estimators: Sequence[Any]) -> None:
        self.gate = gate
        self.estimators = estimators

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Return the probabilities [T, C] of rows [T, ...]; all experts know all classes."""
        rows = _flat(x)
        alone = [estimator.predict_proba(rows) for estimator in self.estimators]
        total: np.ndarray = np.einsum("te,etc->tc", self._weights(rows), np.stack(alone))
        return total

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the values [T] of rows [T, ...]."""
        rows = _flat(x)
        alone = [estimator.predict(rows) for estimator in self.estimators]
        total: np.ndarray = (self._weights(rows) * np.stack(alone, axis=1)).sum(axis=1)
        return total

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        scores = rows @ self.gate[0].T + self.gate[1]
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights: np.ndarray = shares / shares.sum(axis=1, keepdims=True)
        return weights


def _flat(x: np.ndarray) -> np.ndarray:
    rows = np.asarray(x, np.float64)
    return rows.reshape(len(rows), -1)


def combined(folder: Path) -> Combined:
    """Return the bundled mixture in a folder, ``digits`` or ``diabetes``, as one estimator."""
    import yaml
    from safetensors.numpy import load_file

    document = yaml.safe_load((folder / "mixture.yaml").read_text(encoding="utf-8"))
    gate = load_file(folder / "gates.safetensors")
    experts = [_estimator(folder / part["file"]) for part in document["experts"].values()]
    return Combined((gate["gate/weight"], gate["gate/bias"]), experts)


def _estimator(file: Path) -> Any:
    """Load a file of this repository, whose types are therefore trusted."""
    from skops.io import get_untrusted_types, load

    return load(file, trusted=get_untrusted_types(file=file))
