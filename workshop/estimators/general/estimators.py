"""Mixtures whose experts are any scikit-learn estimators, fitted by EM.

Dimension letters: N rows, F features, E experts, D outputs of a regression, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import _name_estimators
from sklearn.utils.metaestimators import _BaseComposition

from experts.mixture.parts import checked_name
from workshop.estimators.base import (
    MixtureClassifier,
    MixtureRegressor,
    Targets,
    progress,
)
from workshop.estimators.general.divisions import divisions_of
from workshop.estimators.general.ensemble import GATE, EnsembleEM
from workshop.estimators.general.fits import MAX_VALUE, Data, Expert, Fold, folds_of, given_folds
from workshop.estimators.general.gates import learner_of
from workshop.estimators.general.unseen import Judge, UnseenSearch, best_start, run, score_of
from workshop.estimators.iterative import (
    AT_LEAST_0,
    AT_LEAST_1,
    MAX_SEED,
    Ascent,
    IterativeMixture,
    Limits,
    parameter,
)
from workshop.estimators.parts import Array


@dataclass(eq=False, repr=False)
class _MixtureOfExperts(IterativeMixture, _BaseComposition):
    """The fit by EM, of regression and classification."""

    _method: ClassVar[str]
    """The method of an expert that the mixture calls."""
    experts: Any = parameter(None, list, None, by_keyword=False)
    gate: Any = parameter("linear", object)
    top_k: int | None = parameter(None, AT_LEAST_1, None)
    cv: Any = parameter(10, "cv_object")
    n_init: int = parameter(4, AT_LEAST_1)
    max_iter: int = parameter(100, AT_LEAST_1)
    tol: float = parameter(1e-4, AT_LEAST_0)
    n_iter_no_change: int = parameter(3, AT_LEAST_1)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters, with those of named experts as ``NAME__PARAMETER``."""
        if self._has_names():
            params: dict[str, Any] = self._get_params("experts", deep=deep)
            return params
        return dict(super().get_params(deep=deep))

    def set_params(self, **params: Any) -> Self:
        """Set parameters, those of named experts as ``NAME__PARAMETER`` or whole as ``NAME``."""
        if "experts" in params:
            self.experts = params.pop("experts")
        if self._has_names():
            self._set_params("experts", **params)
        else:
            super().set_params(**params)
        return self

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, is_warm: bool, random: np.random.RandomState
    ) -> None:
        experts = self._named_experts(random)
        given = X, y
        X, targets, weights = self._check_fit(X, y, sample_weight, reset=not is_warm)
        self._check_numbers(experts, X, targets, weights)
        places, others = self._split(targets, random)
        data = Data(X, targets, weights, getattr(self, "classes_", None))
        train = data if others is None else data.of(places)
        judge: Judge | None = None
        if others is not None:
            held_out = data.of(others)
            judge = lambda em: score_of(em.mixture(self.top_k), held_out)  # noqa: E731
        seed = random.randint(MAX_SEED)
        folds: list[Fold] = []
        if isinstance(self.cv, Integral):
            is_classification = train.classes is not None
            folds = folds_of(train.X, train.targets, int(self.cv), is_classification, seed)
        elif self.cv is not None:
            all_used = np.ndim(sample_weight) == 0  # None, or one weight for all rows
            numbers = np.arange(len(X)) if all_used else np.flatnonzero(sample_weight)
            folds = given_folds(self.cv, *given, numbers[places])
        gate_source = np.random.RandomState(seed)
        learner = learner_of(self.gate, len(experts), lambda gate: _seeded(gate, gate_source))
        begun = EnsembleEM(experts, learner, train, self.n_jobs, folds)
        if is_warm:
            self._check_same(experts)
        divisions = [] if is_warm else divisions_of(train, len(experts), self.n_init, random)
        losses: dict[str, float] | None = None
        chosen: str | None = None
        if folds:
            if is_warm:
                divisions = [np.exp(self.mixture_.log_gates(train.X))]
            run_em = partial(self._run, judge=judge)
            search = UnseenSearch(begun, train, folds, divisions, self._limits, run_em)
            ascent = search.best()
            losses, chosen = search.losses, search.chosen
        else:
            if is_warm:
                begun.resume(self.mixture_)
            else:
                starts = [partial(begun.started, shares) for shares in divisions]
                begun = best_start(starts, self._limits, judge)
            ascent = self._run(begun, self._limits, judge)
        self._set_records(cv_losses_=losses, chosen_=chosen)
        is_cut = not ascent.is_converged and len(ascent.objectives) >= self.max_iter
        warning = f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol"
        scores = np.array(ascent.scores) if ascent.scores else None
        self._set_run(np.array(ascent.objectives), scores, warning if is_cut else None)
        mixture = ascent.best.mixture(self.top_k)
        self._set_fitted(mixture, train.X, train.targets, train.weights)
        ascent.best.warn_of_refusals()

    def _run(self, em: EnsembleEM, limits: Limits, judge: Judge | None) -> Ascent[EnsembleEM]:
        with progress(self.verbose, self.max_iter, type(self).__name__) as advance:
            return run(em, EnsembleEM.step, limits, judge, advance)

    def _has_names(self) -> bool:
        experts = self.experts
        return (
            isinstance(experts, list)
            and len(experts) > 0
            and all(
                isinstance(expert, tuple) and len(expert) == 2 and isinstance(expert[0], str)
                for expert in experts
            )
        )

    def _default_experts(self) -> list[Any]:
        raise NotImplementedError

    def _named_experts(self, source: np.random.RandomState) -> list[Expert]:
        given = self._default_experts() if self.experts is None else list(self.experts)
        if not given:
            raise ValueError("experts: at least one is needed")
        named = given if self._has_names() else _name_estimators(given)
        names = [name for name, _ in named]
        for name, estimator in named:
            checked_name(name)
            if name == GATE or names.count(name) > 1:
                raise ValueError(f"experts: the name {name!r} is taken; names must differ")
            _check_methods(name, estimator, ("fit", self._method))
        return [Expert(name, _seeded(clone(estimator), source)) for name, estimator in named]

    def _check_numbers(
        self, experts: list[Expert], X: Array, targets: Targets, weights: Array
    ) -> None:
        if len(X) < len(experts):
            raise ValueError(
                f"n_samples={len(X)} should be at least the number of experts, {len(experts)}"
            )
        for name, values in (("X", X), ("y", targets)):
            if np.abs(values).max() > MAX_VALUE:
                raise ValueError(
                    f"{name} has values above {MAX_VALUE:g}, whose squares are too large"
                )
        if self.top_k is not None and self.top_k > len(experts):
            raise ValueError(f"top_k={self.top_k} is more than the {len(experts)} experts")
        without = [expert for expert in experts if expert.weight_keyword is None]
        if without and np.ptp(weights) > 0:
            raise ValueError(f"{without[0]} takes no sample_weight; leave it out")

    def _check_same(self, experts: list[Expert]) -> None:
        names = [expert.name for expert in experts]
        if names != list(self.mixture_.experts):
            raise ValueError(
                f"warm_start: the experts are {', '.join(names)}, and those fitted before are "
                f"{', '.join(self.mixture_.experts)}"
            )


class MixtureOfExpertsRegressor(MixtureRegressor, _MixtureOfExperts):
    """A mixture of any regressors, each with normal noise of its own.

    Experts whose ``fit`` takes ``sample_weight`` (a pipeline's last step counts) are fitted to
    shares of rows, the others to whole rows; :mod:`workshop.estimators.general.ensemble` has
    the algorithm and its guarantee. Without ``cv`` an expert that reproduces its training rows, as
    the nearest neighbour does, has hardly any noise left, and takes all of them.

    Parameters:

    - ``experts``: a list of regressors, or of pairs of a name and a regressor; by default two
      linear ones. They are cloned. Random states that are ``None`` are drawn from
      ``random_state``.
    - ``gate``: ``linear`` (softmax regression), ``mlp`` (a network with 16 hidden units), or a
      scikit-learn classifier whose decision is linear or an MLP. It learns which expert is likely
      to have made a row, from features of mean 0 and deviation 1; its scores become the gate's.
    - ``top_k``: the experts that predict a row, by default all. EM uses all of them.
    - ``cv``: a number of folds, a splitter or splits as scikit-learn has them, or ``None``. With it
      EM is generalised EM of the out-of-fold likelihood: each row's outputs come from clones fitted
      to the other folds, and so do the deviations, the objective and the gate's targets (Wolpert
      1992, "Stacked generalization"). That objective never falls. The
      experts of the mixture are then fitted to all rows. EM is the last of several mixtures, of
      which rows that they were not fitted to choose by the squared error, of a classification that
      of the probabilities: one expert alone or the mean with the constant weights of least squares
      (Breiman 1996, "Stacked regressions"), whichever has the least loss (van der Laan, Polley and
      Hubbard 2007, "Super learner"); the gate over experts fitted to all rows; EM. The last two
      must be better than the simpler one by more than two standard errors. ``cv_losses_`` has the
      mean losses (those of a regression relative to the variance), that of EM by the folds that
      judged it: one of at most five after another does, until it cannot win any more. ``chosen_``
      is the name of the mixture taken. ``None``: EM judges experts by the rows that they were
      fitted to, and its mixture is taken.
    - ``n_init``: the divisions of the rows that EM starts from, by k-means and by planes in turns.
      Of several, the one of the best score after five iterations is taken, with ``cv`` after one.
    - ``max_iter``, ``tol``, ``n_iter_no_change``: the most iterations of EM; it ends earlier where
      the score rose by less than ``tol`` in so many iterations, and with ``cv`` where the loss of
      the rows that judge it falls no more.
    - ``early_stopping``, ``validation_fraction``: whether the score is that of rows held out, whose
      best mixture stays, instead of the objective.
    - ``warm_start``: whether a second fit continues from the first; with ``cv``, whether its gate
      makes the first division.
    - ``n_jobs``: the experts that are fitted at once; ``verbose``: whether a bar shows progress.

    ``validation_scores_`` [n_iter_] are those of early stopping. ``log_likelihoods_`` are EM's,
    without ``top_k``; where no expert takes weights they are of each row's likeliest expert alone.
    """

    _method = "predict"

    def _default_experts(self) -> list[Any]:
        return [LinearRegression(), LinearRegression()]


class MixtureOfExpertsClassifier(MixtureClassifier, _MixtureOfExperts):
    """A mixture of any classifiers with ``predict_proba``.

    The parameters are those of :class:`MixtureOfExpertsRegressor`; the default experts are two
    logistic regressions. A class that an expert never saw has probability 0 in its prediction. In
    the likelihood, and so in :meth:`responsibilities` with ``y``, each expert spreads a probability
    of 0.001 evenly over all classes, so that no class is impossible. An expert whose rows are all
    of one class is replaced by a constant one until it gets others. One that refuses rare classes
    is fitted without them; where that stays so at the end, it is a :class:`FitFailedWarning`.
    """

    _method = "predict_proba"

    def _default_experts(self) -> list[Any]:
        return [LogisticRegression(), LogisticRegression()]


def _check_methods(name: str, estimator: Any, methods: Sequence[str]) -> None:
    """Raise ``ValueError`` for an expert that is no estimator, or lacks one of the methods."""
    if isinstance(estimator, type):
        raise ValueError(f"expert {name!r} is the class {estimator.__name__}, not an estimator")
    for method in methods:
        # Some classes, as StackingRegressor, have the method of an instance only when fitted.
        if not hasattr(estimator if method == "predict_proba" else type(estimator), method):
            is_classifier = method == "predict_proba" and hasattr(estimator, "predict")
            hint = "; wrap it in CalibratedClassifierCV" if is_classifier else ""
            raise ValueError(f"expert {name!r} ({type(estimator).__name__}) has no {method}{hint}")


def _seeded(estimator: Any, source: np.random.RandomState) -> Any:
    """Set the random states of an estimator that are ``None``; returns it."""
    drawn = {
        key: source.randint(2**31 - 1)
        for key, value in sorted(estimator.get_params(deep=True).items())
        if (key == "random_state" or key.endswith("__random_state")) and value is None
    }
    return estimator.set_params(**drawn) if drawn else estimator
