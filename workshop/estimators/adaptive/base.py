"""The fit that the estimators of :mod:`workshop.estimators.adaptive.estimators` have in common.

Dimension letters: N rows, E experts, F inputs, T steps of a sequence, W outputs, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal, cast

import numpy as np
import torch
from sklearn.base import is_classifier
from sklearn.utils._param_validation import StrOptions

from workshop.estimators.adaptive.fit import Fit, FitSettings, Rows, fit_network
from workshop.estimators.adaptive.network import Architecture, Cell, PackedRows
from workshop.estimators.adaptive.parts import fitted_mixture, take_over
from workshop.estimators.base import Targets
from workshop.estimators.iterative import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    MAX_SEED,
    IterativeMixture,
    parameter,
)
from workshop.estimators.parts import Array
from workshop.estimators.parts import Rows as RawRows
from workshop.estimators.scale import Scale, Scales
from workshop.estimators.sequences import Sequences

BATCH_ROWS = 200
CELLS = {"plain", "gru", "lstm"}
SAME_SETTINGS = (
    "loss", "init", "top_k", "importance_weight", "load_weight", "alpha", "learning_rate",
)  # fmt: skip
"""The parameters that a fit takes as they are."""


@dataclass(eq=False, repr=False)
class AdaptiveMixture(IterativeMixture):
    """The parameters and the fit of both estimators, which document them."""

    n_experts: int = parameter(4, AT_LEAST_1, by_keyword=False)
    experts: Literal["linear", "mlp", "rnn"] = parameter(
        "linear", StrOptions({"linear", "mlp", "rnn"})
    )
    hidden_layer_sizes: int | Sequence[int] = parameter((16,), "array-like", AT_LEAST_1)
    gate_hidden_layer_sizes: int | Sequence[int] = parameter((), "array-like", AT_LEAST_1)
    activation: Literal["tanh", "relu"] = parameter("tanh", StrOptions({"tanh", "relu"}))
    cell: Cell | Sequence[Cell] = parameter("gru", StrOptions(CELLS), list, tuple, np.ndarray)
    pool: Literal["flatten", "mean", "last"] = parameter(
        "mean", StrOptions({"flatten", "mean", "last"})
    )
    loss: Literal["competitive", "cooperative"] = parameter(
        "competitive", StrOptions({"competitive", "cooperative"})
    )
    top_k: int | None = parameter(None, AT_LEAST_1, None)
    noisy_gate: bool = parameter(False, "boolean")
    importance_weight: float = parameter(0.0, AT_LEAST_0)
    load_weight: float = parameter(0.0, AT_LEAST_0)
    init: Literal["kmeans", "random"] = parameter("kmeans", StrOptions({"kmeans", "random"}))
    solver: Literal["auto", "lbfgs", "adam"] = parameter(
        "auto", StrOptions({"auto", "lbfgs", "adam"})
    )
    alpha: float = parameter(0.1, AT_LEAST_0)
    learning_rate: float = parameter(0.01, ABOVE_0)
    batch_size: Literal["auto"] | int = parameter("auto", StrOptions({"auto"}), AT_LEAST_1)
    max_iter: int = parameter(500, AT_LEAST_1)
    n_iter_no_change: int = parameter(10, AT_LEAST_1)

    @property
    def _row_axes(self) -> int:
        return 2 if self.experts == "rnn" else 1

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, is_warm: bool, random: np.random.RandomState
    ) -> None:
        self._check_parameters()
        X, targets, weights = self._check_fit(X, y, sample_weight, reset=not is_warm)
        used, held_out = self._split(targets, random)
        if len(used) < self.n_experts:
            raise ValueError(
                f"n_samples={len(used)} with a weight above 0 to train on must be at least "
                f"n_experts={self.n_experts}"
            )
        scales = Scales(
            Scale.of(*_steps(X[used], weights[used])),
            self._target_scale(targets[used], weights[used]),
        )
        rows, validation = (
            None if places is None else _standardised(X, targets, weights, places, scales)
            for places in (used, held_out)
        )
        assert rows is not None
        architecture = self._architecture(X)
        settings = self._settings(len(rows.x), scales, is_warm)
        seeds = random.randint(MAX_SEED, size=1 if is_warm else self.n_init).tolist()
        best = self._best_of(
            [partial(fit_network, architecture, settings, rows, validation, seed) for seed in seeds]
        )
        self._take_over(best, scales, X[used], targets[used], weights[used])
        warning = (
            f"{type(self).__name__} stopped at max_iter={self.max_iter} before the loss "
            "stopped falling"
        )
        log_likelihoods = np.array(best.log_likelihoods) - scales.log_units
        self._set_run(log_likelihoods, None, None if best.has_converged else warning)

    def _take_over(
        self, fit: Fit, scales: Scales, rows: RawRows, targets: Targets, weights: Array
    ) -> None:
        """Set the fitted attributes."""
        steps = (rows.shape[1] if self.pool == "flatten" else -1,) if rows.ndim == 3 else ()
        deviations = None if fit.deviations is None else fit.deviations.numpy()
        row_shape = (*steps, rows.shape[-1])
        kind: Literal["mean", "density", "probabilities"] = "probabilities"
        if not is_classifier(self):
            kind = "density" if self.loss == "competitive" else "mean"
        mixture = fitted_mixture(fit.network, scales, kind, row_shape, self.top_k, deviations)
        if mixture.kind == "mean":
            self._set_mixture(mixture, rows, weights)
            self.log_likelihood_ = fit.log_likelihood - scales.log_units
        else:
            self._set_fitted(mixture, rows, targets, weights)

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

    def _architecture(self, rows: RawRows) -> Architecture:
        is_sequence = rows.ndim == 3
        if isinstance(rows, Sequences) and self.pool == "flatten":
            raise ValueError(
                "pool='flatten' needs sequences of one length (given: lengths of "
                f"{rows.lengths.min()} to {rows.lengths.max()} steps); 'mean' and 'last' take any"
            )
        flattened = int(np.prod(rows.shape[1:]))
        deviation: Any = getattr(self, "deviation", "none")  # a classifier has none
        if self.loss == "cooperative" or not isinstance(deviation, str):
            deviation = "none"
        return Architecture(
            num_experts=int(self.n_experts),
            gate_inputs=flattened if self.pool == "flatten" else rows.shape[-1],
            num_inputs=rows.shape[-1],
            width=self._width,
            experts=self.experts,
            hidden_sizes=tuple(map(int, _sizes(self.hidden_layer_sizes))),
            gate_hidden_sizes=tuple(map(int, _sizes(self.gate_hidden_layer_sizes))),
            activation=self.activation,
            cells=self._cells(),
            pool=self.pool if is_sequence else "flatten",
            deviation=deviation,
            top_k=int(self.top_k or self.n_experts),
            is_noisy=bool(self.noisy_gate),
        )

    def _settings(self, num_rows: int, scales: Scales, is_warm: bool) -> FitSettings:
        solver = self.solver
        if solver == "auto":
            solver = "adam" if self.noisy_gate else "lbfgs"
        batch_size = min(BATCH_ROWS, num_rows) if self.batch_size == "auto" else self.batch_size
        own = {name: getattr(self, name) for name in SAME_SETTINGS}
        deviations, given = None, getattr(self, "deviation", "none")
        if not isinstance(given, str):
            deviations = np.tile(float(given) / scales.targets.deviation, (self.n_experts, 1))
        return FitSettings(
            **own,
            solver=solver,
            batch_size=int(batch_size),
            limits=self._limits,
            deviations=None if deviations is None else torch.from_numpy(deviations),
            first=(lambda network: take_over(network, self.mixture_, scales)) if is_warm else None,
        )


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
