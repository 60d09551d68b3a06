"""Fitted mixtures beside their own experts alone and scikit-learn's estimators.

    python -m benchmarks.mixture_fit [--quick] [--sets NAME ...] [--seed N] [--processes N]
        [--json FILE]

Regression: `diabetes` (Efron et al. 2004), `friedman1` (Friedman 1991, noise 1) and `pieces`, four
linear pieces with jumps at oblique borders. Classification: `breast_cancer`, `wine`, and
`two_pieces`, whose boundary differs on both sides of a plane, with 3 % of the labels wrong.

The score is the mean over folds, R² or accuracy. Models have their settings chosen on the training
rows of a fold by five inner folds from a few candidates, and the time of a fit includes that
search: processor seconds on one thread. A mixture of linear experts is compared with one such
expert, of the same candidates; it has several experts only where they beat the best single one by
more than a standard error over the inner folds (the one-standard-error rule of Breiman et al.
1984). The mixture of unlike experts has the same settings on all sets, as its experts alone have.

All models have the same folds, so two of them are compared by the differences of their scores on
each fold: their mean, and its standard error. The best expert alone and the best peer are those of
the best mean on these very folds, which favours them.

Promise: on every set no mixture is worse than the best of its own experts alone by more than one
standard error. On the two sets of pieces, the best mixture beats the best peer by more than two.
That error is the larger one of Nadeau and Bengio 2003, as the training rows of folds overlap. The
seed decides folds, made sets, and starts; settings and code were tried out with seeds below 10.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import sklearn
from joblib import Parallel, delayed
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine, make_friedman1
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from threadpoolctl import threadpool_limits

from benchmarks.common import (
    Figure,
    Verdict,
    finish,
    machine,
    output_options,
    progress,
    show,
    show_verdicts,
)
from router.workshop.mixture.estimators import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)

FOLDS, QUICK_FOLDS, INNER_FOLDS = 5, 3, 5
DEFAULT_SEED = 10
ROUNDING = 1e-9
"""One row less in one fold is a difference of exactly one standard error."""
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


@dataclass(frozen=True, slots=True)
class Result:
    """A model's scores on the folds of a set, and the processor seconds of its fits."""

    set: str
    model: str
    kind: str
    of: str
    scores: list[float]
    fit_s: list[float]

    @property
    def mean(self) -> float:
        """The mean score."""
        return float(np.mean(self.scores))


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
        Model("MLP", PEER, mlp, {"mlpregressor__alpha": (1e-4, 0.1, 10.0)}),
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
        Model("MLP", PEER, mlp, {"mlpclassifier__alpha": (1e-4, 0.1, 10.0)}),
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


def folds(
    estimator: Any, data: Data, num_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the places of the training and the test rows of each fold, the same for all models."""
    kind = StratifiedKFold if is_classifier(estimator) else KFold
    return list(kind(num_folds, shuffle=True, random_state=seed).split(*data))


def chosen(results: Mapping[str, Any], single: tuple[str, Any] | None) -> int:
    """Return the place of the best candidate among the results of a search over settings.

    The best of those with one expert is taken unless the best of all beats it by more than a
    standard error of the difference over the search's folds.
    """
    means = np.asarray(results["mean_test_score"])
    best = int(means.argmax())
    if single is None:
        return best
    parameter, value = single
    is_single = np.array([params[parameter] == value for params in results["params"]])
    simple = int(np.where(is_single, means, -np.inf).argmax())
    splits = [key for key in results if key.startswith("split") and key.endswith("_test_score")]
    mean, error = difference(*([results[key][place] for key in splits] for place in (best, simple)))
    return best if mean > error else simple


def measured(name: str, model: Model, data: Data, num_folds: int, seed: int) -> Result:
    """Fit a model to each fold's training rows, search included, and score it on the others."""
    kind = StratifiedKFold if is_classifier(model.estimator) else KFold
    inner = kind(INNER_FOLDS, shuffle=True, random_state=seed + 1)
    search = clone(model.estimator)
    if model.candidates:
        choice = partial(chosen, single=model.single)
        candidates = dict(model.candidates)
        search = GridSearchCV(search, candidates, cv=inner, error_score="raise", refit=choice)
    rows, targets = data
    scores, fit_s = [], []
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # candidates that need more iterations score as they are
        for train, test in folds(model.estimator, data, num_folds, seed):
            began_s = time.process_time()
            search.fit(rows[train], targets[train])
            fit_s.append(time.process_time() - began_s)
            scores.append(float(search.score(rows[test], targets[test])))
    return Result(name, model.name, model.kind, model.of, scores, fit_s)


def measure(names: Sequence[str], num_folds: int, seed: int, processes: int) -> list[Result]:
    """Measure all models on the sets, in some processes of one thread each."""
    tasks = []
    for name in names:
        data = SETS[name](seed)
        models = regressors(seed) if data[1].dtype.kind == "f" else classifiers(seed)
        tasks += [(name, model, data, num_folds, seed) for model in models]
    results = []
    with progress("mixture_fit", len(tasks)) as begin:
        parallel = Parallel(n_jobs=processes, return_as="generator")
        for task, result in zip(tasks, parallel(map(_task, tasks)), strict=True):
            begin(f"{task[0]}, {task[1].name}")
            results.append(result)
    return results


def _task(task: tuple[str, Model, Data, int, int]) -> Any:
    return delayed(_one_thread)(*task)


def _one_thread(*task: Any) -> Result:
    import torch

    torch.set_num_threads(1)
    return measured(*task)


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of two models' scores over folds, and its standard error."""
    differences = np.subtract(one, other)
    return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)


def overlap_factor(num_folds: int) -> float:
    """Return the factor by which overlapping training rows widen a standard error over folds.

    Nadeau and Bengio 2003, "Inference for the generalization error": the variance of a mean over
    K folds grows from 1/K to 1/K + 1/(K - 1), the second the ratio of test to training rows.
    """
    return float((1 + num_folds / (num_folds - 1)) ** 0.5)


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Compare each mixture with its own experts, and on pieces the best mixture with all peers."""
    found = []
    for name in dict.fromkeys(result.set for result in results):
        here = [result for result in results if result.set == name]
        mixtures = [result for result in here if result.kind == MIXTURE]
        for mixture in mixtures:
            best = _best([result for result in here if result.of == mixture.model])
            mean, error = difference(mixture.scores, best.scores)
            found.append(
                Verdict(
                    f"{name}: {mixture.model} - {best.model}",
                    f"{mean:+.4f} ± {error:.4f}",
                    "at least - 1 error",
                    mean >= -error - ROUNDING,
                )
            )
        if name in PIECES:
            best, peer = _best(mixtures), _best([one for one in here if one.kind == PEER])
            mean, error = difference(best.scores, peer.scores)
            error *= overlap_factor(len(best.scores))
            found.append(
                Verdict(
                    f"{name}: {best.model} - {peer.model}",
                    f"{mean:+.4f} ± {error:.4f}",
                    "above 2 errors",
                    mean > 2 * error,
                )
            )
    return found


def _best(results: Sequence[Result]) -> Result:
    return max(results, key=lambda result: result.mean)


def show_results(results: Sequence[Result], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Print a table for each set, the best score first."""
    for name, shape in shapes.items():
        here = sorted((one for one in results if one.set == name), key=lambda one: -one.mean)
        rows = [
            (
                one.model,
                one.kind,
                f"{one.mean:.4f}",
                f"{np.std(one.scores):.4f}",
                f"{np.mean(one.fit_s):.2f}",
            )
            for one in here
        ]
        metric = "R²" if name in ("diabetes", "friedman1", "pieces") else "accuracy"
        title = f"{name}: {shape[0]:,} rows of {shape[1]}"
        show(title, rows, ["model", "", metric, "± over folds", "fit, processor s"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixture_fit", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_FOLDS} folds of {FOLDS}")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of folds and made sets")
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS], help="the sets")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="fits at once, a thread each"
    )
    output_options(parser)
    options = parser.parse_args(argv)
    num_folds = QUICK_FOLDS if options.quick else FOLDS
    results = measure(options.sets, num_folds, options.seed, options.processes)
    show_results(results, {name: SETS[name](options.seed)[0].shape for name in options.sets})
    found = verdicts(results)
    show_verdicts("mixtures beside their own experts, and beside peers on pieces", found)
    result = {
        "machine": {**machine(), "scikit-learn": sklearn.__version__},
        "folds": num_folds,
        "seed": options.seed,
        "results": [asdict(one) for one in results],
        "verdicts": [asdict(one) for one in found],
    }
    figures: dict[str, Figure] = {}
    for one in results:
        is_ours = one.kind == MIXTURE
        name = f"{one.set} {one.model}"
        figures[f"{name} score"] = Figure(one.mean, "higher" if is_ours else "context")
        figures[f"{name} fit s"] = Figure(
            float(np.mean(one.fit_s)), "lower" if is_ours else "context"
        )
    status = finish(result, figures, options)
    return status or int(not all(verdict.is_kept for verdict in found))


if __name__ == "__main__":
    sys.exit(main())
