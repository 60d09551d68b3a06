"""The sets and the models that ``mixture_fit`` compares: mixtures, their experts alone, peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine, make_friedman1
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from router.workshop.mixture.estimators import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)

ALPHAS = {"alpha": (1e-4, 1.0, 10.0)}
RIDGES = {"ridge": (0.01, 10.0)}
PIECES = ("pieces", "two_pieces")
MIXTURE, EXPERT, PEER = "mixture", "own expert alone", "peer"
ADAPTIVE, HIERARCHICAL = "adaptive, linear experts", "hierarchical, linear experts"
OF_EXPERTS = "of experts, unlike ones"
Data = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Model:
    """An estimator with the candidates of its settings; ``of`` is the mixture of an expert."""

    name: str
    kind: str
    estimator: Any
    candidates: Mapping[str, Sequence[Any]]
    of: str = ""
    single: tuple[str, Any] | None = None
    """The parameter and its value that make one expert of a mixture."""


def pieces(seed: int) -> Data:
    """Return 1,200 rows [3] of four linear pieces, with noise of a standard deviation of 0.2."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-1, 1, (1200, 3))
    is_right = rows[:, 0] + 0.5 * rows[:, 1] > 0
    is_upper = np.where(is_right, rows[:, 2] > 0.5 * rows[:, 0], rows[:, 1] + rows[:, 2] > 0.2)
    slopes = np.array([[3, -2, 1], [-3, 1, 2], [0, 4, -1], [2, 2, -4]])
    levels = np.array([1, -2, 3, -1])
    piece = 2 * is_right + is_upper
    values = (rows * slopes[piece]).sum(axis=1) + levels[piece]
    return rows, values + 0.2 * rng.normal(size=len(rows))


def two_pieces(seed: int) -> Data:
    """Return 1,000 rows [4] of two classes; every label is wrong with a probability of 0.03."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-1, 1, (1000, 4))
    left, right = rows[:, 1] + 0.5 * rows[:, 2], rows[:, 3] - rows[:, 1]
    is_positive = np.where(rows[:, 0] < 0, left, right) > 0
    return rows, (is_positive ^ (rng.uniform(size=len(rows)) < 0.03)).astype(int)


SETS: Mapping[str, Callable[[int], Data]] = {
    "diabetes": lambda seed: load_diabetes(return_X_y=True),
    "friedman1": lambda seed: make_friedman1(600, noise=1.0, random_state=seed),
    "pieces": pieces,
    "breast_cancer": lambda seed: load_breast_cancer(return_X_y=True),
    "wine": lambda seed: load_wine(return_X_y=True),
    "two_pieces": two_pieces,
}
"""The sets by name, made with a seed where they are made."""


def regressors(seed: int) -> list[Model]:
    """Return the models of a regression."""
    svr, mlp = _scaled(SVR()), _scaled(MLPRegressor(max_iter=1000, random_state=seed))
    return [
        *_mixtures(
            AdaptiveMixtureRegressor,
            HierarchicalMixtureRegressor,
            MixtureOfExpertsRegressor,
            {
                "line": LinearRegression(),
                "curve": _scaled(SVR(C=10.0)),
                "forest": RandomForestRegressor(50, min_samples_leaf=5, random_state=seed),
            },
            seed,
        ),
        Model("LinearRegression", PEER, LinearRegression(), {}),
        Model("SVR", PEER, svr, {"svr__C": (1.0, 10.0, 100.0)}),
        _forest(RandomForestRegressor, seed),
        _boosting(HistGradientBoostingRegressor, seed),
        Model("MLP", PEER, mlp, {}),
    ]


def classifiers(seed: int) -> list[Model]:
    """Return the models of a classification."""
    logistic = _scaled(LogisticRegression(max_iter=1000))
    svc, mlp = _scaled(SVC()), _scaled(MLPClassifier(max_iter=1000, random_state=seed))
    return [
        *_mixtures(
            AdaptiveMixtureClassifier,
            HierarchicalMixtureClassifier,
            MixtureOfExpertsClassifier,
            {
                "line": logistic,
                "forest": RandomForestClassifier(50, min_samples_leaf=5, random_state=seed),
            },
            seed,
        ),
        Model("LogisticRegression", PEER, logistic, {"logisticregression__C": (0.1, 1.0, 10.0)}),
        Model("SVC", PEER, svc, {"svc__C": (1.0, 10.0, 100.0)}),
        _forest(RandomForestClassifier, seed),
        _boosting(HistGradientBoostingClassifier, seed),
        Model("MLP", PEER, mlp, {}),
    ]


def _mixtures(
    adaptive: Any, hierarchical: Any, of_experts: Any, experts: Any, seed: int
) -> list[Model]:
    """Return the mixtures, each followed by its own experts alone."""
    one, tree = adaptive(1, random_state=seed), hierarchical((1,), random_state=seed)
    several, trees = adaptive(random_state=seed), hierarchical(n_init=3, random_state=seed)
    unlike = of_experts(list(experts.items()), random_state=seed)
    numbers, branching = {"n_experts": (1, 2, 4)}, {"branching": ((1,), (2,), (2, 2))}
    return [
        Model(ADAPTIVE, MIXTURE, several, {**numbers, **ALPHAS}, single=("n_experts", 1)),
        Model("one adaptive expert", EXPERT, one, ALPHAS, ADAPTIVE),
        Model(HIERARCHICAL, MIXTURE, trees, {**branching, **RIDGES}, single=("branching", (1,))),
        Model("one hierarchical expert", EXPERT, tree, RIDGES, HIERARCHICAL),
        Model(OF_EXPERTS, MIXTURE, unlike, {}),
        *(
            Model(f"{name} alone", EXPERT, expert, {}, OF_EXPERTS)
            for name, expert in experts.items()
        ),
    ]


def _forest(cls: Any, seed: int) -> Model:
    return Model("RandomForest", PEER, cls(random_state=seed), {"min_samples_leaf": (1, 3)})


def _boosting(cls: Any, seed: int) -> Model:
    estimator = cls(random_state=seed)
    return Model("HistGradientBoosting", PEER, estimator, {"learning_rate": (0.03, 0.1)})


def _scaled(estimator: Any) -> Any:
    return make_pipeline(StandardScaler(), estimator)
