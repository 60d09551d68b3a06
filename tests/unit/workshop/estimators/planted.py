"""Mixtures whose weights are drawn, and an estimator that takes them without a fit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch

from workshop.estimators.base import MixtureClassifier, MixtureEstimator, MixtureRegressor
from workshop.estimators.parts import FittedMixture, GatePart, Layers, NetworkPart, RecurrentPart

FEATURES = 3


def layers_of(source: np.random.Generator, *sizes: int) -> Layers:
    """Return drawn layers between these sizes."""
    return tuple(
        (source.normal(size=(out, given)), source.normal(size=out))
        for given, out in pairwise(sizes)
    )


def tree(seed: int, **changes: Any) -> FittedMixture:
    """Return three experts below two gates, one of them an MLP that keeps one of its two."""
    source = np.random.default_rng(seed)
    width = changes.get("width", 2)
    gates = {
        "top": GatePart(layers_of(source, FEATURES, 2), ("below", "c")),
        "below": GatePart(layers_of(source, FEATURES, 5, 2), ("a", "b"), top_k=1),
    }
    link = "softmax" if changes.get("kind") == "probabilities" else "none"
    experts = {
        "a": NetworkPart(layers_of(source, FEATURES, width), link=link),
        "b": NetworkPart(layers_of(source, FEATURES, 4, width), "relu", link),
        "c": NetworkPart(layers_of(source, FEATURES, 4, 4, width), "tanh", link),
    }
    content = {"kind": "density", "deviations": source.uniform(0.5, 2, size=(3, width))}
    if link == "softmax":
        content = {"kind": "probabilities"}
    mixture: dict[str, Any] = {"row_shape": (FEATURES,), "width": width, **content, **changes}
    return FittedMixture("top", gates, experts, **mixture)


def torch_rnn(cell: str, width: int = 2) -> torch.nn.ModuleDict:
    """Return a recurrent network in float64, whose weights follow torch's seed."""
    kind = {"plain": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    modules = {
        "rnn": kind(FEATURES, 4, num_layers=2, batch_first=True),
        "head": torch.nn.Linear(4, width),
    }
    return torch.nn.ModuleDict(modules).double()


def recurrent_part(cell: str, module: torch.nn.ModuleDict, link: str = "none") -> RecurrentPart:
    """Return a torch module as a part."""
    tensors = {name: t.detach().numpy().copy() for name, t in module.state_dict().items()}
    return RecurrentPart(cell, tensors, link)


class _Planted(MixtureEstimator):
    """Takes over a mixture instead of fitting one; its parameters are for records alone."""

    def __init__(self, value: Any = None, estimator: Any = None) -> None:
        self.value = value
        self.estimator = estimator

    @classmethod
    def of(cls, mixture: FittedMixture, **parameters: Any) -> Self:
        planted = cls(**parameters)
        planted.mixture_ = mixture
        planted.n_iter_ = 3
        return planted

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        X, targets, weights = self._check_fit(X, y, sample_weight)
        self._set_fitted(self.mixture_, X, targets, weights)
        return self

    @property
    def _row_axes(self) -> int:
        return len(self.mixture_.row_shape) if hasattr(self, "mixture_") else 1


class PlantedRegressor(MixtureRegressor, _Planted):
    """A regressor with a given mixture."""


class PlantedClassifier(MixtureClassifier, _Planted):
    """A classifier with a given mixture."""
