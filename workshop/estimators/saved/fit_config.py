"""The configuration of ``expertmesh fit``: a YAML file, validated before any row is read.

Beside it are the mixture's experts alone, each fitted to all rows, and the scores of all.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import accuracy_score, r2_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cluster.errors import ConfigError, shown, shown_name
from router.config.deployment import read_document
from workshop.estimators.saved.record import ESTIMATORS

Task = Literal["regression", "classification"]
FAMILIES = {
    "adaptive": "AdaptiveMixture",
    "hierarchical": "HierarchicalMixture",
    "of_experts": "MixtureOfExperts",
}
_KINDS = {"regression": "Regressor", "classification": "Classifier"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LearnerSettings(_Section):
    """An estimator of scikit-learn, by the name of its class; the name alone may stand for it."""

    estimator: str = Field(min_length=1, description="A class of scikit-learn, such as `SVR`.")
    parameters: dict[str, Any] = Field(
        default={}, description="Parameters of the class; others keep their defaults."
    )
    scaled: bool = Field(
        default=True, description="Whether columns get mean 0 and deviation 1 before it."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"estimator": value} if isinstance(value, str) else value


class FitConfig(_Section):
    """What is fitted to which columns, and which share of the rows tests it."""

    estimator: Literal["adaptive", "hierarchical", "of_experts"] = Field(
        description="The kind of mixture: local experts of 1991, a tree of gates of 1994, or any "
        "scikit-learn estimators as experts."
    )
    task: Task = Field(description="Whether the target has values or classes.")
    target: str | list[str] = Field(
        description="The column to predict; a regression may have a list of columns."
    )
    features: list[str] | None = Field(
        default=None, description="The columns to predict from; by default all others."
    )
    values_per_step: int | None = Field(
        default=None,
        ge=1,
        description="For recurrent experts: a row is a sequence of steps with so many values each, "
        "step after step. Cells at the end of a shorter sequence stay empty.",
    )
    held_out: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="The share of rows, drawn by `seed`, that the fit does not see and the score "
        "is of; 0 fits all rows and gives no score.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="The same seed and rows give the same mixture."
    )
    parameters: dict[str, Any] = Field(
        default={}, description="Parameters of the estimator's class, such as `n_experts`."
    )
    experts: dict[str, LearnerSettings] | None = Field(
        default=None, description="Of `of_experts` alone: the experts by name."
    )

    @field_validator("target", "features")
    @classmethod
    def _columns_differ(cls, value: Any) -> Any:
        if isinstance(value, list) and (not value or len(set(value)) < len(value)):
            raise ValueError("must be different columns, at least one")
        return value

    @field_validator("experts")
    @classmethod
    def _there_are_experts(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("must have at least one expert")
        return value

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if (self.estimator == "of_experts") != (self.experts is not None):
            needs = "needs" if self.experts is None else "does not take"
            raise ValueError(f"estimator {self.estimator} {needs} the key experts")
        if self.task == "classification" and len(self.targets) > 1:
            raise ValueError("a classification has one target")
        both = sorted(set(self.targets) & set(self.features or ()))
        if both:
            raise ValueError(f"column {both[0]!r} is both target and feature")
        return self

    @property
    def targets(self) -> list[str]:
        """The target's columns."""
        return [self.target] if isinstance(self.target, str) else self.target

    @property
    def class_name(self) -> str:
        """The name of the estimator's class."""
        return f"{FAMILIES[self.estimator]}{_KINDS[self.task]}"


def load_fit_config(file: Path) -> FitConfig:
    """Read and validate a configuration.

    Raises :class:`ConfigError` whose field is the file and the key of the first error.
    """
    document = read_document(file)
    if not isinstance(document, dict):
        raise ConfigError("must be keys and values, such as `target: price`", str(file))
    try:
        return FitConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{file}: {'.'.join(map(str, first['loc']))}".removesuffix(": ")
        if first["type"] == "extra_forbidden":
            is_nested = len(first["loc"]) > 1
            section = LearnerSettings if is_nested else FitConfig
            keys = ", ".join(section.model_fields)
            raise ConfigError(f"unknown key; allowed keys: {keys}", where) from None
        message = first["msg"].removeprefix("Value error, ")
        is_given = first["type"] not in ("missing", "value_error")
        given = f" (given: {shown(first['input'])})" if is_given else ""
        raise ConfigError(f"{message}{given}", where) from None


def build(config: FitConfig, file: Path) -> Any:
    """Return the estimator of a configuration, not fitted.

    Raises :class:`ConfigError`, whose field is the file and the key, for a class or a parameter
    that does not exist. Values of parameters are checked by the fit.
    """
    cls = getattr(importlib.import_module(ESTIMATORS[config.class_name]), config.class_name)
    parameters = {**config.parameters, "random_state": config.seed}
    own = {"random_state": "seed", "verbose": ""}
    if config.experts is not None:
        own["experts"] = "experts"
    allowed = [name for name in inspect.signature(cls).parameters if name not in own]
    _check_parameters(config.parameters, allowed, own, f"{file}: parameters")
    if config.experts is not None:
        parameters["experts"] = [
            (name, _learner(settings, config.task, f"{file}: experts.{name}"))
            for name, settings in config.experts.items()
        ]
    return cls(**parameters)


def _learner(settings: LearnerSettings, task: Task, where: str) -> Any:
    classes = _learners(task)
    cls = classes.get(settings.estimator)
    if cls is None:
        names = {name.lower(): name for name in classes}
        near = [names[name] for name in get_close_matches(settings.estimator.lower(), names)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(
            f"{shown(settings.estimator)} is no {_KINDS[task].lower()} of scikit-learn{hint}",
            f"{where}.estimator",
        )
    _check_parameters(settings.parameters, list(_signature(cls)), {}, f"{where}.parameters")
    learner = cls(**settings.parameters)
    return make_pipeline(StandardScaler(), learner) if settings.scaled else learner


def _check_parameters(
    given: Mapping[str, Any], allowed: Sequence[str], own: Mapping[str, str], where: str
) -> None:
    """Check names; ``own`` are those of parameters that a key of the file gives, with the key."""
    for name in given:
        if name in allowed:
            continue
        if own.get(name):
            raise ConfigError(f"is given by the key {own[name]}", f"{where}.{shown_name(name)}")
        raise ConfigError(
            f"is no parameter; parameters: {', '.join(sorted(allowed))}",
            f"{where}.{shown_name(name)}",
        )


@cache
def _learners(task: Task) -> dict[str, Any]:
    """Return scikit-learn's estimators that need no other estimator, by the names of classes."""
    from sklearn.utils import all_estimators

    return {
        name: cls
        for name, cls in all_estimators(type_filter=_KINDS[task].lower())
        if all(one.default is not one.empty for one in _signature(cls).values())
    }


def _signature(cls: Any) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }


SINGLE = {"top_k": None, "noisy_gate": False, "importance_weight": 0.0, "load_weight": 0.0}
"""Parameters of a gate, as a single expert has them."""
MAX_ITER = 1000
MIN_PROBABILITY = float(np.finfo(np.float64).eps)
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
    loss = -np.log(np.maximum(likelihoods, MIN_PROBABILITY)).mean()
    return {"accuracy": accuracy, "log_loss": float(loss)}
