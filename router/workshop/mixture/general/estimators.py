"""Mixtures whose experts are any scikit-learn estimators, fitted by EM.

Dimension letters: N rows, F features, E experts, D outputs of a regression, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import _name_estimators
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.metaestimators import _BaseComposition

from experts.mixture.parts import checked_name
from router.workshop.mixture.base import (
    MixtureClassifier,
    MixtureEstimator,
    MixtureRegressor,
    Targets,
    progress,
)
from router.workshop.mixture.general.divisions import divisions_of
from router.workshop.mixture.general.ensemble import GATE, EnsembleEM
from router.workshop.mixture.general.fits import MOST_VALUE, Data, Expert
from router.workshop.mixture.general.folds import Fold, Rows, folds_of, given_folds
from router.workshop.mixture.general.gates import learner_of
from router.workshop.mixture.general.search import Limits, Run, best_start, run
from router.workshop.mixture.general.unseen import UnseenSearch
from router.workshop.mixture.parts import Array


class _MixtureOfExperts(MixtureEstimator, _BaseComposition):
    """The fit by EM, of regression and classification."""

    log_likelihoods_: Array
    _method: ClassVar[str]
    """The method of an expert that the mixture calls."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "experts": [list, None],
        "gate": "no_validation",
        "top_k": [Interval(Integral, 1, None, closed="left"), None],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "cv": ["cv_object"],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "warm_start": ["boolean"],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        experts: Any = None,
        *,
        gate: Any = "linear",
        top_k: int | None = None,
        cv: Any = 10,
        n_init: int = 4,
        max_iter: int = 100,
        tol: float = 1e-4,
        n_iter_no_change: int = 3,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        """Keep the parameters; :meth:`fit` checks them."""
        self.experts = experts
        self.gate = gate
        self.top_k = top_k
        self.cv = cv
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit experts and gate to rows X [N, F], their targets, and optional weights [N].

        Raises ``ValueError`` for wrong parameters and data, for fewer rows than experts, and, as
        :class:`router.workshop.mixture.general.fits.FitFailedError`, which names the expert, for
        one that cannot be fitted to its first rows. The estimator is then as before. Warns
        :class:`FitFailedWarning` where that happens later, and :class:`ConvergenceWarning` after
        ``max_iter`` iterations.
        """
        with self._as_before_on_failure():
            self._fit(X, y, sample_weight)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:
        self._validate_params()
        source = check_random_state(self.random_state)
        experts = self._named_experts(source)
        is_warm = bool(self.warm_start) and hasattr(self, "mixture_")
        given = X, y
        X, targets, weights = self._check_fit(X, y, sample_weight, reset=not is_warm)
        self._check_numbers(experts, X, targets, weights)
        train, held_out, places = self._divided(X, targets, weights, source)
        seed = source.randint(2**31 - 1)
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
        limits = Limits(self.max_iter, self.tol, self.n_iter_no_change, self.top_k)
        divisions = [] if is_warm else divisions_of(train, len(experts), self.n_init, source)
        if folds:
            if is_warm:
                divisions = [np.exp(self.mixture_.log_gates(train.X))]
            run_em = partial(self._run, held_out=held_out)
            search = UnseenSearch(begun, train, folds, divisions, limits, run_em)
            result = search.best()
            self._set_records(cv_losses_=search.losses, chosen_=search.chosen)
        else:
            if is_warm:
                begun.resume(self.mixture_)
            else:
                starts = [partial(begun.started, shares) for shares in divisions]
                _, begun = best_start(starts, limits, held_out)
            result = self._run(begun, limits, held_out)
            self._set_records(cv_losses_=None, chosen_=None)
        self._set_run(result)
        self._set_fitted(result.em.mixture(self.top_k), train.X, train.targets, train.weights)
        result.em.warn_of_refusals()

    def _run(self, em: EnsembleEM, limits: Limits, held_out: Data | None) -> Run:
        with progress(self.verbose, self.max_iter, type(self).__name__) as advance:
            return run(em, EnsembleEM.step, limits, held_out, advance)

    def _set_run(self, result: Run) -> None:
        self.n_iter_ = len(result.objectives)
        self.log_likelihoods_ = result.objectives
        self._set_records(validation_scores_=result.scores)
        if not result.is_converged and self.n_iter_ >= self.max_iter:
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=4,
            )

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
            if np.abs(values).max() > MOST_VALUE:
                raise ValueError(
                    f"{name} has values above {MOST_VALUE:g}, whose squares are too large"
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

    def _divided(
        self, X: Array, targets: Targets, weights: Array, source: np.random.RandomState
    ) -> tuple[Data, Data | None, Rows]:
        """Return the rows to fit, those to validate with, and the numbers of those to fit.

        Only early stopping validates.
        """
        classes: npt.NDArray[Any] | None = getattr(self, "classes_", None)
        train, held_out = self._split(targets, source)
        if held_out is None:
            return Data(X, targets, weights, classes), None, train
        fit, validation = (
            Data(X[rows], targets[rows], weights[rows], classes) for rows in (train, held_out)
        )
        return fit, validation, train


class MixtureOfExpertsRegressor(MixtureRegressor, _MixtureOfExperts):
    """A mixture of any regressors, each with normal noise of its own.

    Experts whose ``fit`` takes ``sample_weight`` (a pipeline's last step counts) are fitted to
    shares of rows, the others to whole rows; :mod:`router.workshop.mixture.general.ensemble` has
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
    - ``warm_start``: whether a second fit goes on from the first; with ``cv``, whether its gate
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
