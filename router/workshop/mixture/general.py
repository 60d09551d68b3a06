"""Mixtures whose experts are any scikit-learn estimators, fitted by EM.

Dimension letters: N rows, F features, E experts, D outputs of a regression, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import train_test_split
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
from router.workshop.mixture.ensemble import GATE, Data, EnsembleEM, Expert, FitFailedError
from router.workshop.mixture.gates import Scale, learner_of
from router.workshop.mixture.parts import Array, FittedMixture

TRIAL_ITERATIONS = 5
"""The iterations of EM after which the best of several starts goes on alone."""
_NUM_KMEANS = 3


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
        :class:`router.workshop.mixture.ensemble.FitFailedError`, which names the expert, for one
        that cannot be fitted to its first rows. Warns :class:`FitFailedWarning` where that happens
        later, and :class:`ConvergenceWarning` after ``max_iter`` iterations.
        """
        self._validate_params()
        source = check_random_state(self.random_state)
        experts = self._named_experts(source)
        is_warm = bool(self.warm_start) and hasattr(self, "mixture_")
        X, targets, weights = self._check_fit(X, y, sample_weight, reset=not is_warm)
        self._check_numbers(experts, X, weights)
        train, held_out = self._divided(X, targets, weights, source)
        seed = source.randint(2**31 - 1)

        def begun() -> EnsembleEM:
            gate_source = np.random.RandomState(seed)
            learner = learner_of(self.gate, len(experts), lambda gate: _seeded(gate, gate_source))
            return EnsembleEM(experts, learner, train, self.n_jobs)

        if is_warm:
            self._check_same(experts)
            em = begun()
            em.resume(self.mixture_)
        else:
            em = self._best_start(begun, train, held_out, len(experts), source)
        mixture = self._iterate(em, held_out)
        self._set_fitted(mixture, train.X, train.targets, train.weights)
        return self

    def _best_start(
        self,
        begun: Callable[[], EnsembleEM],
        train: Data,
        held_out: Data | None,
        num_experts: int,
        source: np.random.RandomState,
    ) -> EnsembleEM:
        """Try ``n_init`` divisions of the rows; returns the one of the best score, as begun.

        A division to whose parts an expert cannot be fitted is left out. Raises the first
        :class:`FitFailedError` where that is so for all of them.
        """
        best: tuple[float, Array] | None = None
        error: FitFailedError | None = None
        for start in range(self.n_init if num_experts > 1 else 1):
            shares = _first_shares(train, num_experts, source, is_plain=start == 0)
            try:
                em = begun()
                em.start(shares)
            except FitFailedError as failure:
                error = error or failure
                continue
            if self.n_init == 1 or num_experts == 1:
                return em
            for _ in range(min(TRIAL_ITERATIONS, self.max_iter)):
                score = em.step()
            if held_out is not None:
                score = _score(em.mixture(self.top_k), held_out)
            if best is None or score > best[0]:
                best = score, shares
        if best is None:
            assert error is not None  # at least one start was tried
            raise error
        em = begun()
        em.start(best[1])
        return em

    def _iterate(self, em: EnsembleEM, held_out: Data | None) -> FittedMixture:
        """Run EM until the score stops rising; returns the last mixture, or that of best score.

        The score is the objective of EM, or the mean log likelihood of the rows held out.
        """
        objectives: list[float] = []
        scores: list[float] = []
        best, best_score, since_rise = em.mixture(self.top_k), -np.inf, 0
        with progress(self.verbose, self.max_iter, type(self).__name__) as advance:
            while len(objectives) < self.max_iter and since_rise < self.n_iter_no_change:
                objectives.append(em.step())
                score = objectives[-1]
                if held_out is not None:
                    mixture = em.mixture(self.top_k)
                    score = _score(mixture, held_out)
                    scores.append(score)
                    best = mixture if score > best_score else best
                since_rise = 0 if score > best_score + self.tol else since_rise + 1
                best_score = max(score, best_score)
                advance(f"log likelihood {score:.6g}")
        self.n_iter_ = len(objectives)
        self.log_likelihoods_ = np.array(objectives)
        if held_out is not None:
            self.validation_scores_ = np.array(scores)
        elif hasattr(self, "validation_scores_"):
            del self.validation_scores_  # of an earlier fit
        if since_rise < self.n_iter_no_change:
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        return em.mixture(self.top_k) if held_out is None else best

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

    def _check_numbers(self, experts: list[Expert], X: Array, weights: Array) -> None:
        if len(X) < len(experts):
            raise ValueError(
                f"n_samples={len(X)} should be at least the number of experts, {len(experts)}"
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
    ) -> tuple[Data, Data | None]:
        """Return the rows to fit, and with early stopping those to validate with."""
        classes: npt.NDArray[Any] | None = getattr(self, "classes_", None)
        if not self.early_stopping:
            return Data(X, targets, weights, classes), None
        train, held_out = train_test_split(
            np.arange(len(X)),
            test_size=self.validation_fraction,
            random_state=source.randint(2**31 - 1),
            stratify=None if classes is None else targets,
        )
        if len(train) < 1 or len(held_out) < 1:
            raise ValueError("early_stopping: too few rows to hold some out")
        fit, validation = (
            Data(X[rows], targets[rows], weights[rows], classes) for rows in (train, held_out)
        )
        return fit, validation


class MixtureOfExpertsRegressor(MixtureRegressor, _MixtureOfExperts):
    """A mixture of any regressors, each with normal noise of its own.

    Experts whose ``fit`` takes ``sample_weight`` (a pipeline's last step counts) are fitted to
    shares of rows, the others to whole rows; :mod:`router.workshop.mixture.ensemble` has the
    algorithm and its guarantee. An expert that reproduces its training rows, as the nearest
    neighbour does, has hardly any noise left, and takes all of them.

    Parameters:

    - ``experts``: a list of regressors, or of pairs of a name and a regressor; by default two
      linear ones. They are cloned. Random states that are ``None`` are drawn from
      ``random_state``.
    - ``gate``: ``linear`` (softmax regression), ``mlp`` (a network with 16 hidden units), or a
      scikit-learn classifier whose decision is linear or an MLP. It learns which expert is likely
      to have made a row, from features of mean 0 and deviation 1; its scores become the gate's.
    - ``top_k``: the experts that predict a row, by default all. EM uses all of them.
    - ``n_init``: the divisions of the rows that EM starts from, by k-means; of several, the one of
      the best score after five iterations is taken.
    - ``max_iter``, ``tol``, ``n_iter_no_change``: the most iterations of EM; it ends earlier where
      the score rose by less than ``tol`` in so many iterations.
    - ``early_stopping``, ``validation_fraction``: whether the score is that of rows held out, whose
      best mixture stays, instead of the objective.
    - ``warm_start``: whether a second fit goes on from the first.
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
    of one class is replaced by a constant one until it gets others.
    """

    _method = "predict_proba"

    def _default_experts(self) -> list[Any]:
        return [LogisticRegression(), LogisticRegression()]


def _score(mixture: FittedMixture, held_out: Data) -> float:
    """Return the mean log likelihood of rows held out, by weight."""
    densities = mixture.log_density(held_out.X, held_out.targets)
    return float(np.average(densities, weights=held_out.weights))


def _check_methods(name: str, estimator: Any, methods: Sequence[str]) -> None:
    """Raise ``ValueError`` for an expert that is no estimator, or lacks one of the methods."""
    if isinstance(estimator, type):
        raise ValueError(f"expert {name!r} is the class {estimator.__name__}, not an estimator")
    for method in methods:
        if not hasattr(estimator, method):
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


def _first_shares(
    data: Data, num_experts: int, source: np.random.RandomState, is_plain: bool
) -> Array:
    """Return the shares [N, E] of a first division: k-means of the scaled rows.

    Unless it ``is_plain``, features count by random weights, and so do the targets of a regression.
    Equal rows count as one of their weights' sum, so that a weight is worth as many repetitions.
    """
    columns = data.X
    if not is_plain and data.classes is None:
        columns = np.column_stack([data.X, data.targets])
    distinct, places = np.unique(columns, axis=0, return_inverse=True)
    places = places.reshape(-1)
    if len(distinct) <= num_experts:
        return np.eye(num_experts)[places]
    scaled = Scale.of(columns, data.weights)(distinct)
    if not is_plain:
        scaled = scaled * source.exponential(size=scaled.shape[1])
    kmeans = KMeans(num_experts, n_init=_NUM_KMEANS, random_state=source.randint(2**31 - 1))
    labels = kmeans.fit_predict(scaled, sample_weight=np.bincount(places, data.weights))
    shares: Array = np.eye(num_experts)[labels[places]]
    return shares
