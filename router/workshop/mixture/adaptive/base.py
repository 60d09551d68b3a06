"""The fit that the estimators of :mod:`router.workshop.mixture.adaptive.estimators` have in common.

Dimension letters: N rows, E experts, F inputs, T steps of a sequence, W outputs, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.parallel import Parallel, delayed

from router.workshop.mixture.adaptive.fit import Fit, FitSettings, Rows, fit_network
from router.workshop.mixture.adaptive.network import Architecture, Cell
from router.workshop.mixture.adaptive.packed import PackedRows
from router.workshop.mixture.adaptive.parts import (
    Scales,
    fitted_mixture,
    take_over,
)
from router.workshop.mixture.base import (
    MixtureEstimator,
    Targets,
    progress,
)
from router.workshop.mixture.parts import Array
from router.workshop.mixture.parts import Rows as RawRows
from router.workshop.mixture.scale import Scale
from router.workshop.mixture.sequences import Sequences

MAX_SEED = 2**31 - 1
BATCH_ROWS = 200
CELLS = {"plain", "gru", "lstm"}
_AT_LEAST_1 = [Interval(Integral, 1, None, closed="left")]
_AT_LEAST_0 = [Interval(Real, 0, None, closed="left")]
ABOVE_0 = [Interval(Real, 0, None, closed="neither")]


class AdaptiveMixture(MixtureEstimator):
    """The parameters and the fit of both estimators, which document them."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_experts": _AT_LEAST_1,
        "experts": [StrOptions({"linear", "mlp", "rnn"})],
        "hidden_layer_sizes": ["array-like", *_AT_LEAST_1],
        "gate_hidden_layer_sizes": ["array-like", *_AT_LEAST_1],
        "activation": [StrOptions({"tanh", "relu"})],
        "cell": [StrOptions(CELLS), list, tuple, np.ndarray],
        "pool": [StrOptions({"flatten", "mean", "last"})],
        "loss": [StrOptions({"competitive", "cooperative"})],
        "top_k": [*_AT_LEAST_1, None],
        "noisy_gate": ["boolean"],
        "importance_weight": _AT_LEAST_0,
        "load_weight": _AT_LEAST_0,
        "init": [StrOptions({"kmeans", "random"})],
        "n_init": _AT_LEAST_1,
        "solver": [StrOptions({"auto", "lbfgs", "adam"})],
        "alpha": _AT_LEAST_0,
        "learning_rate": ABOVE_0,
        "batch_size": [StrOptions({"auto"}), *_AT_LEAST_1],
        "max_iter": _AT_LEAST_1,
        "tol": _AT_LEAST_0,
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": _AT_LEAST_1,
        "warm_start": ["boolean"],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_experts: int = 4,
        *,
        experts: Literal["linear", "mlp", "rnn"] = "linear",
        hidden_layer_sizes: int | Sequence[int] = (16,),
        gate_hidden_layer_sizes: int | Sequence[int] = (),
        activation: Literal["tanh", "relu"] = "tanh",
        cell: Cell | Sequence[Cell] = "gru",
        pool: Literal["flatten", "mean", "last"] = "mean",
        loss: Literal["competitive", "cooperative"] = "competitive",
        top_k: int | None = None,
        noisy_gate: bool = False,
        importance_weight: float = 0.0,
        load_weight: float = 0.0,
        init: Literal["kmeans", "random"] = "kmeans",
        n_init: int = 3,
        solver: Literal["auto", "lbfgs", "adam"] = "auto",
        alpha: float = 0.1,
        learning_rate: float = 0.01,
        batch_size: Literal["auto"] | int = "auto",
        max_iter: int = 500,
        tol: float = 1e-5,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        warm_start: bool = False,
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.n_experts = n_experts
        self.experts = experts
        self.hidden_layer_sizes = hidden_layer_sizes
        self.gate_hidden_layer_sizes = gate_hidden_layer_sizes
        self.activation = activation
        self.cell = cell
        self.pool = pool
        self.loss = loss
        self.top_k = top_k
        self.noisy_gate = noisy_gate
        self.importance_weight = importance_weight
        self.load_weight = load_weight
        self.init = init
        self.n_init = n_init
        self.solver = solver
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @property
    def _row_axes(self) -> int:
        return 2 if self.experts == "rnn" else 1

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the gate and the experts to rows ``X`` [N, F], or [N, T, F] for recurrent experts.

        Sequences of several lengths are a list of N arrays [T, F].

        Raises ``ValueError`` as scikit-learn does for data and parameters, and for fewer rows than
        experts; :class:`NotFiniteError` for a loss that becomes NaN or infinite. The estimator is
        then as before. Warns with ``ConvergenceWarning`` where ``max_iter`` ends the fit.
        """
        with self._as_before_on_failure():
            self._fit(X, y, sample_weight)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:
        self._validate_params()
        self._check_parameters()
        is_warm = self.warm_start and hasattr(self, "mixture_")
        X, targets, weights = self._check_fit(X, y, sample_weight, reset=not is_warm)
        random = check_random_state(self.random_state)
        used, held_out = self._split(targets, random)
        if len(used) < self.n_experts:
            raise ValueError(
                f"n_samples={len(used)} with a weight above 0 to train on must be at least "
                f"n_experts={self.n_experts}"
            )
        scales = Scales(
            Scale.of(*_steps(X[used], weights[used])),
            self._target_scale(targets, weights, used),
        )
        rows, validation = (
            None if places is None else _standardised(X, targets, weights, places, scales)
            for places in (used, held_out)
        )
        assert rows is not None
        architecture = self._architecture(X, self._width(targets))
        settings = self._settings(len(rows.x), scales, is_warm)
        seeds = random.randint(MAX_SEED, size=1 if is_warm else self.n_init).tolist()
        fits = self._fit_all(architecture, settings, rows, validation, seeds)
        best = max(fits, key=lambda fit: fit.score)  # of equal ones the first
        self._take_over(best, scales, X[used], targets[used], weights[used])

    def _fit_all(
        self,
        architecture: Architecture,
        settings: FitSettings,
        rows: Rows,
        validation: Rows | None,
        seeds: list[int],
    ) -> list[Fit]:
        """Fit from every seed, here or in ``n_jobs`` processes."""
        name = type(self).__name__
        if len(seeds) == 1 or self.n_jobs in (None, 1):
            with progress(self.verbose, len(seeds) * self.max_iter, name) as advance:
                return [
                    fit_network(architecture, settings, rows, validation, seed, advance)
                    for seed in seeds
                ]
        with progress(self.verbose, len(seeds), name) as advance:
            fits = []
            for fit in Parallel(n_jobs=self.n_jobs, return_as="generator")(
                delayed(fit_network)(architecture, settings, rows, validation, seed, _ignore)
                for seed in seeds
            ):
                fits.append(fit)
                advance(f"log likelihood {fit.log_likelihood:.4f}")
            return fits

    def _take_over(
        self, fit: Fit, scales: Scales, rows: RawRows, targets: Targets, weights: Array
    ) -> None:
        """Set the fitted attributes."""
        steps = (rows.shape[1] if self.pool == "flatten" else -1,) if rows.ndim == 3 else ()
        deviations = None
        if fit.deviations is not None:
            deviations = fit.deviations.numpy() * scales.targets.deviation
        mixture = fitted_mixture(
            fit.network,
            scales,
            self._kind(),
            (*steps, rows.shape[-1]),
            self.top_k,
            deviations,
        )
        log_scale = np.log(scales.targets.deviation).sum()
        if mixture.kind == "mean":
            self._set_mixture(mixture, rows, weights)
            self.log_likelihood_ = fit.log_likelihood - float(log_scale)
        else:
            self._set_fitted(mixture, rows, targets, weights)
        self.log_likelihoods_ = np.array(fit.log_likelihoods) - log_scale
        self.n_iter_ = len(fit.log_likelihoods)
        if not fit.has_converged:
            warnings.warn(
                f"{type(self).__name__} stopped at max_iter={self.max_iter} before the loss "
                "stopped falling",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _check_parameters(self) -> None:
        """Raise ``ValueError`` for parameters that contradict each other."""
        sizes = {
            "hidden_layer_sizes": _sizes(self.hidden_layer_sizes),
            "gate_hidden_layer_sizes": _sizes(self.gate_hidden_layer_sizes),
        }
        for name, values in sizes.items():
            if any(not isinstance(size, Integral) or size < 1 for size in values):
                raise ValueError(f"{name} must be integers of at least 1 (given: {values})")
        hidden = sizes["hidden_layer_sizes"]
        if self.experts != "linear" and not hidden:
            raise ValueError(f"hidden_layer_sizes must have a size for experts={self.experts!r}")
        if self.experts == "rnn" and len(set(hidden)) > 1:
            raise ValueError(
                f"hidden_layer_sizes of recurrent experts must be equal (given: {hidden})"
            )
        self._cells()
        if self.top_k is not None and self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k} must be at most n_experts={self.n_experts}")
        if self.noisy_gate and self.solver == "lbfgs":
            raise ValueError("solver='lbfgs' needs a loss without noise; a noisy gate has 'adam'")
        if self.noisy_gate and self.top_k == 1 < self.n_experts:
            raise ValueError(
                "top_k must be at least 2 with a noisy gate: the weight of the only chosen expert "
                "is 1 whatever its score, so that the gate learns nothing"
            )
        if self.load_weight and (not self.noisy_gate or self.top_k in (None, self.n_experts)):
            raise ValueError(
                "load_weight needs noisy_gate=True and a top_k below n_experts: without them "
                "every expert has the same load"
            )

    def _cells(self) -> tuple[Cell, ...]:
        """Return the cell of each recurrent expert; raises ``ValueError`` for wrong ones."""
        if self.experts != "rnn":
            return ()
        if isinstance(self.cell, str):
            return (self.cell,) * self.n_experts
        cells = tuple(self.cell)
        wrong = [cell for cell in cells if not isinstance(cell, str) or cell not in CELLS]
        if wrong:
            raise ValueError(f"cell must be of {', '.join(sorted(CELLS))} (given: {wrong[0]!r})")
        if len(cells) != self.n_experts:
            raise ValueError(
                f"cell must be one of {', '.join(sorted(CELLS))}, or a list with one for each of "
                f"n_experts={self.n_experts} (given: {len(cells)})"
            )
        return tuple(cast(Cell, str(cell)) for cell in cells)  # an array has texts of its own

    def _architecture(self, rows: RawRows, width: int) -> Architecture:
        is_sequence = rows.ndim == 3
        if isinstance(rows, Sequences) and self.pool == "flatten":
            raise ValueError(
                "pool='flatten' needs sequences of one length (given: lengths of "
                f"{rows.lengths.min()} to {rows.lengths.max()} steps); 'mean' and 'last' take any"
            )
        flattened = int(np.prod(rows.shape[1:]))
        return Architecture(
            num_experts=int(self.n_experts),
            gate_inputs=flattened if self.pool == "flatten" else rows.shape[-1],
            num_inputs=rows.shape[-1],
            width=width,
            experts=self.experts,
            hidden_sizes=tuple(map(int, _sizes(self.hidden_layer_sizes))),
            gate_hidden_sizes=tuple(map(int, _sizes(self.gate_hidden_layer_sizes))),
            activation=self.activation,
            cells=self._cells(),
            pool=self.pool if is_sequence else "flatten",
            deviation=self._fitted_deviation(),
            top_k=int(self.top_k or self.n_experts),
            is_noisy=bool(self.noisy_gate),
        )

    def _settings(self, num_rows: int, scales: Scales, is_warm: bool) -> FitSettings:
        solver = self.solver
        if solver == "auto":
            solver = "adam" if self.noisy_gate else "lbfgs"
        batch_size = min(BATCH_ROWS, num_rows) if self.batch_size == "auto" else self.batch_size
        return FitSettings(
            loss=self.loss,
            solver=solver,
            init=self.init,
            top_k=self.top_k,
            importance_weight=self.importance_weight,
            load_weight=self.load_weight,
            alpha=self.alpha,
            learning_rate=self.learning_rate,
            batch_size=int(batch_size),
            max_iter=self.max_iter,
            tol=self.tol,
            n_iter_no_change=self.n_iter_no_change,
            deviations=self._given_deviations(scales),
            first=(lambda network: take_over(network, self.mixture_, scales)) if is_warm else None,
        )

    def _kind(self) -> Literal["mean", "density", "probabilities"]:
        raise NotImplementedError

    def _width(self, targets: Targets) -> int:
        raise NotImplementedError

    def _target_scale(self, targets: Targets, weights: Array, used: np.ndarray) -> Scale:
        raise NotImplementedError

    def _fitted_deviation(self) -> Literal["shared", "expert", "none"]:
        return "none"

    def _given_deviations(self, scales: Scales) -> torch.Tensor | None:
        return None


def _sizes(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return sizes of layers; a number is one layer's."""
    return (int(value),) if isinstance(value, int | np.integer) else tuple(value)


def _standardised(
    X: RawRows,
    targets: Targets,
    weights: Array,
    places: np.ndarray,
    scales: Scales,
) -> Rows:
    wanted, raw = targets[places], X[places]
    if wanted.ndim == 2:
        wanted = scales.targets(wanted)
    x = (
        PackedRows(Sequences(scales.inputs(raw.values), raw.lengths))
        if isinstance(raw, Sequences)
        else torch.from_numpy(scales.inputs(raw))
    )
    return Rows(x, torch.from_numpy(wanted), torch.from_numpy(weights[places]))


def _steps(rows: RawRows, weights: Array) -> tuple[Array, Array]:
    """Return rows and their weights; of unequal sequences the steps, which share the row's."""
    if not isinstance(rows, Sequences):
        return rows, weights
    return rows.values, np.repeat(weights / rows.lengths, rows.lengths)


def _ignore(remark: str) -> None:
    """Show nothing: the process of a start has no progress bar."""
