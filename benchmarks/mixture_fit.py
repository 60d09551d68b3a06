"""Fitted mixtures beside their own experts alone and scikit-learn's estimators.

    python -m benchmarks.mixture_fit [--quick] [--sets NAME ...] [--seeds N ...] [--processes N]
        [--json FILE]

Regression: `diabetes` (Efron et al. 2004), `friedman1` (Friedman 1991, noise 1) and `pieces`, four
linear pieces with jumps at oblique borders. Classification: `breast_cancer`, `wine`, and
`two_pieces`, whose boundary differs on both sides of a plane, with 3 % of the labels wrong.

The score is the mean over folds of all seeds, R² or accuracy. Models have their settings chosen on
the training rows of a fold by five inner folds from a few candidates, and the time of a fit
includes that search: processor seconds on one thread. A mixture of linear experts is compared with
one such expert, of the same candidates; it has several experts only where they beat the best single
one over the inner folds by the corrected resampled t-test (Nadeau and Bengio 2003, "Inference for
the generalization error"), at 1 % for all candidates together. The mixture of unlike experts has
the same settings on all sets, as its experts alone have.

All models have the same folds, so two of them are compared by the differences of their scores on
each fold: their mean, and its standard error, the larger one of Nadeau and Bengio, as the training
rows of folds overlap. The best expert alone and the best peer are those of the best mean on these
very folds, which favours them.

Promise: on every set no mixture is worse in the mean than the best of its own experts alone. On the
two sets of pieces, the best mixture beats the best peer by more than two standard errors. The seeds
decide folds, made sets, and starts; settings and code were tried out with seeds below 10.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import sklearn
from joblib import Parallel, delayed
from scipy import stats
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
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
from benchmarks.mixture_models import (
    MIXTURE,
    PEER,
    PIECES,
    SETS,
    Data,
    Model,
    classifiers,
    regressors,
)

FOLDS, QUICK_FOLDS, INNER_FOLDS = 5, 3, 5
DEFAULT_SEEDS = (14, 15, 16)
MOST_CHANCE = 0.01
"""The chance at which some candidate of several experts passes the test though none is better."""
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Result:
    """A model's scores on the folds of a set, and the processor seconds of its fits.

    The folds of one seed follow those of another.
    """

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


def folds(
    estimator: Any, data: Data, num_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the places of the training and the test rows of each fold, the same for all models."""
    kind = StratifiedKFold if is_classifier(estimator) else KFold
    return list(kind(num_folds, shuffle=True, random_state=seed).split(*data))


def chosen(results: Mapping[str, Any], single: tuple[str, Any] | None) -> int:
    """Return the place of the best candidate among the results of a search over settings.

    The best of those with one expert is taken unless the best of all beats it over the search's
    folds by the corrected resampled t-test. It is the best of several, so its chance is a part of
    theirs (Bonferroni).
    """
    means = np.asarray(results["mean_test_score"])
    best = int(means.argmax())
    if single is None:
        return best
    parameter, value = single
    is_single = np.array([params[parameter] == value for params in results["params"]])
    simple = int(np.where(is_single, means, -np.inf).argmax())
    splits = [key for key in results if key.startswith("split") and key.endswith("_test_score")]
    of_best, of_simple = ([results[key][place] for key in splits] for place in (best, simple))
    mean, error = difference(of_best, of_simple, len(splits))
    chance = MOST_CHANCE / max((~is_single).sum(), 1)
    least = float(stats.t.isf(chance, len(splits) - 1)) * error
    return best if mean > least + ROUNDING else simple


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


def measure(
    names: Sequence[str], num_folds: int, seeds: Sequence[int], processes: int
) -> list[Result]:
    """Measure all models on the sets, in some processes of one thread each."""
    tasks = []
    for seed in seeds:
        for name in names:
            data = SETS[name](seed)
            models = regressors(seed) if data[1].dtype.kind == "f" else classifiers(seed)
            tasks += [(name, model, data, num_folds, seed) for model in models]
    results = []
    with progress("mixture_fit", len(tasks)) as begin:
        parallel = Parallel(n_jobs=processes, return_as="generator")
        for task, result in zip(tasks, parallel(map(_task, tasks)), strict=True):
            begin(f"{task[0]}, {task[1].name}, seed {task[4]}")
            results.append(result)
    return pooled(results)


def pooled(results: Sequence[Result]) -> list[Result]:
    """Return one result of each model on each set, with the folds of all seeds."""
    found: dict[tuple[str, str], Result] = {}
    for one in results:
        before = found.get((one.set, one.model))
        if before is not None:
            scores, fit_s = before.scores + one.scores, before.fit_s + one.fit_s
            one = replace(one, scores=scores, fit_s=fit_s)
        found[one.set, one.model] = one
    return list(found.values())


def _task(task: tuple[str, Model, Data, int, int]) -> Any:
    return delayed(_one_thread)(*task)


def _one_thread(*task: Any) -> Result:
    import torch

    torch.set_num_threads(1)
    return measured(*task)


def difference(one: Sequence[float], other: Sequence[float], num_folds: int) -> tuple[float, float]:
    """Return the mean difference of two models' scores over folds, and its standard error.

    The scores are those of one or several divisions of rows into ``num_folds``. The training rows
    of folds overlap, so the variance of a mean over J scores grows from 1/J to 1/J + 1/(K - 1), the
    second the ratio of test to training rows (Nadeau and Bengio 2003).
    """
    differences = np.subtract(one, other)
    variance = differences.var(ddof=1) * (1 / len(differences) + 1 / (num_folds - 1))
    return float(differences.mean()), float(variance**0.5)


def verdicts(results: Sequence[Result], num_folds: int) -> list[Verdict]:
    """Compare each mixture with its own experts, and on pieces the best mixture with all peers."""
    found = []
    for name in dict.fromkeys(result.set for result in results):
        here = [result for result in results if result.set == name]
        mixtures = [result for result in here if result.kind == MIXTURE]
        for mixture in mixtures:
            best = _best([result for result in here if result.of == mixture.model])
            mean, error = difference(mixture.scores, best.scores, num_folds)
            found.append(
                Verdict(
                    f"{name}: {mixture.model} - {best.model}",
                    f"{mean:+.4f} ± {error:.4f}",
                    "at least 0",
                    mean >= -ROUNDING,
                )
            )
        if name in PIECES:
            best, peer = _best(mixtures), _best([one for one in here if one.kind == PEER])
            mean, error = difference(best.scores, peer.scores, num_folds)
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
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_FOLDS} folds of {FOLDS}, and one seed"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=DEFAULT_SEEDS, help="of folds and made sets"
    )
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS], help="the sets")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="fits at once, a thread each"
    )
    output_options(parser)
    options = parser.parse_args(argv)
    num_folds = QUICK_FOLDS if options.quick else FOLDS
    seeds = options.seeds[:1] if options.quick else options.seeds
    results = measure(options.sets, num_folds, seeds, options.processes)
    show_results(results, {name: SETS[name](seeds[0])[0].shape for name in options.sets})
    found = verdicts(results, num_folds)
    show_verdicts("mixtures beside their own experts, and beside peers on pieces", found)
    result = {
        "machine": {**machine(), "scikit-learn": sklearn.__version__},
        "folds": num_folds,
        "seeds": list(seeds),
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
