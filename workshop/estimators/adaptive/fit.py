"""The fit of an adaptive mixture from one start: L-BFGS over all rows, or Adam over batches.

Everything is computed by one thread, in float64, so that a start's result depends only on its seed
and the data. Dimension letters: N rows, E experts, W outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cluster.errors import NotFiniteError
from workshop.estimators.adaptive.loss import (
    class_log_likelihoods,
    competitive_losses,
    cooperative_losses,
    cooperative_values,
    normal_log_likelihoods,
)
from workshop.estimators.adaptive.network import (
    MIN_VARIANCE,
    AdaptiveNetwork,
    Architecture,
    RowsTensor,
)
from workshop.estimators.adaptive.noisy_gate import balancing_loss
from workshop.estimators.adaptive.starts import place_experts
from workshop.estimators.iterative import Ascent, Limits

Advance = Callable[[str], object]
"""Takes a remark after each iteration."""
_MIN_GRADIENT = 1e-9
_MEMORY = 50


@dataclass(frozen=True)
class Rows:
    """Rows to fit: standardised ``x`` [N, ...], ``targets`` [N, W] or classes [N], weights [N]."""

    x: RowsTensor
    targets: Tensor
    sample_weight: Tensor

    def batch(self, places: Tensor) -> Rows:
        """Return some of the rows."""
        return Rows(self.x[places], self.targets[places], self.sample_weight[places])

    def mean(self, values: Tensor) -> Tensor:
        """Return the weighted mean of ``values`` [N]."""
        return self.sample_weight @ values / self.sample_weight.sum()


@dataclass(frozen=True)
class FitSettings:
    """How a network is fitted; the names are those of the estimators' parameters.

    ``deviations`` [E, W] are given ones, in units of standardised targets. ``first`` sets the first
    weights of a warm start in place of ``init``.
    """

    loss: Literal["competitive", "cooperative"]
    solver: Literal["lbfgs", "adam"]
    init: Literal["kmeans", "random"]
    top_k: int | None
    importance_weight: float
    load_weight: float
    alpha: float
    learning_rate: float
    batch_size: int
    limits: Limits
    deviations: Tensor | None = None
    first: Callable[[AdaptiveNetwork], None] | None = None


@dataclass(frozen=True)
class Fit:
    """A fitted network. Log likelihoods are means of rows, of standardised targets.

    ``log_likelihoods`` are those of the training rows in each iteration, as the gate was then (with
    its noise). ``log_likelihood`` is that of the mixture as it is served, ``score`` the same for
    the validation rows where there are some. ``deviations`` are [E, W].
    """

    network: AdaptiveNetwork
    log_likelihoods: list[float]
    log_likelihood: float
    score: float
    deviations: Tensor | None
    has_converged: bool


def fit_network(
    architecture: Architecture,
    settings: FitSettings,
    rows: Rows,
    validation: Rows | None,
    seed: int,
    advance: Advance = lambda remark: None,
) -> Fit:
    """Fit a network from one start.

    With ``validation`` rows the weights of the iteration that has the least loss for them remain.
    Raises :class:`NotFiniteError` for a loss that is NaN or infinite.
    """
    random = np.random.RandomState(seed)
    generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
    with one_thread():
        network = AdaptiveNetwork(architecture)
        network.draw(random)
        if settings.first is not None:
            settings.first(network)
        elif settings.init == "kmeans":
            place_experts(network, rows.x, rows.targets, rows.sample_weight, random)
        objective = _Objective(network, settings)
        progress = _Progress(objective, validation, advance)
        if settings.solver == "lbfgs":
            has_converged = _minimise(objective, rows, progress)
        else:
            has_converged = _descend(objective, rows, progress, generator)
        progress.restore_best()
        with torch.no_grad():
            _, log_likelihood = objective.served(rows)
            score = log_likelihood if validation is None else objective.served(validation)[1]
            deviations = objective.deviations()
    return Fit(network, progress.log_likelihoods, log_likelihood, score, deviations, has_converged)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and BLAS use one thread, so that sums have one order; their numbers come back."""
    num_threads = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


class _Objective:
    """The mean loss of rows, with the penalty of weights and the losses that balance experts."""

    def __init__(self, network: AdaptiveNetwork, settings: FitSettings) -> None:
        self.network = network
        self.settings = settings
        self._decayed = network.decayed()

    def training(self, rows: Rows, generator: torch.Generator) -> tuple[Tensor, float]:
        """Return the objective, and the mean log likelihood, with the noise of a noisy gate."""
        settings, probabilities = self.settings, None
        if self.network.architecture.is_noisy:
            log_gates, probabilities = self.network.noisy_log_gates(rows.x, generator)
        else:
            log_gates = self.network.log_gates(rows.x, None)
        total, log_likelihood = self._mean_loss(rows, log_gates)
        if settings.importance_weight:
            importance = balancing_loss(log_gates.exp(), rows.sample_weight)
            total = total + settings.importance_weight * importance
        if settings.load_weight:
            assert probabilities is not None
            load = balancing_loss(probabilities, rows.sample_weight)
            total = total + settings.load_weight * load
        return total, log_likelihood

    def penalty(self, weight: float) -> Tensor:
        """Return ``alpha / 2`` times the sum of squared weights, per unit of rows' weight."""
        squares = torch.stack([w.square().sum() for w in self._decayed])
        return 0.5 * self.settings.alpha / weight * squares.sum()

    def served(self, rows: Rows) -> tuple[float, float]:
        """Return the mean loss and the mean log likelihood of the mixture as it is served."""
        log_gates = self.network.log_gates(rows.x, self.settings.top_k)
        loss, log_likelihood = self._mean_loss(rows, log_gates)
        return loss.item(), log_likelihood

    def deviations(self) -> Tensor | None:
        """Return the experts' deviations [E, W]; ``None`` where there are none.

        Those of a cooperative mixture are no experts' but the sum's, and so not among them.
        """
        if self.settings.deviations is not None:
            return self.settings.deviations
        if self.network.architecture.deviation == "none":
            return None
        return self.network.deviations()

    def _mean_loss(self, rows: Rows, log_gates: Tensor) -> tuple[Tensor, float]:
        outputs = self.network.outputs(rows.x)
        is_competitive = self.settings.loss == "competitive"
        if rows.targets.is_floating_point():
            if not is_competitive:
                loss = rows.mean(cooperative_losses(log_gates, outputs, rows.targets))
                return loss, self._normal_log_likelihood(rows, log_gates, outputs)
            deviations = self.deviations()
            assert deviations is not None
            log_likelihoods = normal_log_likelihoods(outputs, rows.targets, deviations)
        else:
            log_likelihoods = class_log_likelihoods(outputs, rows.targets)
        loss = rows.mean(competitive_losses(log_gates, log_likelihoods))
        log_likelihood = -float(loss.detach())
        if not is_competitive:
            probabilities = outputs.softmax(dim=2)
            wanted = torch.nn.functional.one_hot(rows.targets, outputs.shape[2]).to(outputs.dtype)
            loss = rows.mean(cooperative_losses(log_gates, probabilities, wanted))
        return loss, log_likelihood

    def _normal_log_likelihood(self, rows: Rows, log_gates: Tensor, outputs: Tensor) -> float:
        """Return the mean log density of a normal distribution around the cooperative sum.

        Its deviation is the given one, or that of the greatest likelihood.
        """
        with torch.no_grad():
            left = rows.targets - cooperative_values(log_gates, outputs)
            if self.settings.deviations is not None:
                deviations = self.settings.deviations[:1]
            else:
                variance = rows.mean(left.square().mean(dim=1)).clamp(min=MIN_VARIANCE)
                deviations = variance.sqrt().expand(1, left.shape[1])
            zeros = torch.zeros_like(left)[:, None]
            return float(rows.mean(normal_log_likelihoods(zeros, left, deviations)[:, 0]))


class _Progress:
    """The iterations so far, judged by the loss: that of validation rows if there are some."""

    def __init__(self, objective: _Objective, validation: Rows | None, advance: Advance) -> None:
        self.log_likelihoods: list[float] = []
        self._ascent: Ascent[Tensor | None] = Ascent(objective.settings.limits, None)
        self._objective = objective
        self._validation = validation
        self._advance = advance

    def is_over(self, loss: float, log_likelihood: float) -> bool:
        """Take an iteration's mean loss and log likelihood; return whether the loss has settled."""
        self.log_likelihoods.append(log_likelihood)
        weights = None
        if self._validation is not None:
            with torch.no_grad():
                loss, _ = self._objective.served(self._validation)
            weights = parameters_to_vector(self._objective.network.parameters()).detach().clone()
        if not math.isfinite(loss):
            raise _not_finite(loss, len(self.log_likelihoods))
        self._ascent.take(weights, -loss)
        self._advance(f"log likelihood {log_likelihood:.4f}")
        return self._ascent.is_converged

    def restore_best(self) -> None:
        """Bring back the weights that were best for the validation rows."""
        if self._ascent.best is not None:
            vector_to_parameters(self._ascent.best, self._objective.network.parameters())


def _not_finite(loss: float, iteration: int) -> NotFiniteError:
    return NotFiniteError(
        f"the loss is {loss} in iteration {iteration} of the fit; scaled inputs and targets, a "
        "smaller learning_rate or a larger alpha may help"
    )


def _minimise(objective: _Objective, rows: Rows, progress: _Progress) -> bool:
    """Minimise by L-BFGS over all rows (Liu and Nocedal 1989); return whether it converged."""
    limits, has_settled = objective.settings.limits, False
    parameters = list(objective.network.parameters())
    weight = float(rows.sample_weight.sum())
    unused = torch.Generator()
    latest: dict[str, Any] = {}

    def value_and_gradient(vector: np.ndarray) -> tuple[float, np.ndarray]:
        vector_to_parameters(torch.from_numpy(vector.copy()), parameters)
        mean_loss, log_likelihood = objective.training(rows, unused)
        total = mean_loss + objective.penalty(weight)
        if not torch.isfinite(total):
            raise _not_finite(total.item(), len(progress.log_likelihoods) + 1)
        gradient = parameters_to_vector(torch.autograd.grad(total, parameters)).numpy()
        latest.update(vector=vector.copy(), loss=total.item(), log_likelihood=log_likelihood)
        return total.item(), gradient

    def after_iteration(vector: np.ndarray) -> None:
        if not np.array_equal(vector, latest["vector"]):
            value_and_gradient(vector)
        nonlocal has_settled
        has_settled = progress.is_over(latest["loss"], latest["log_likelihood"])
        if has_settled:
            raise StopIteration

    start = parameters_to_vector(parameters).detach().numpy().copy()
    options = {
        "maxiter": limits.max_iter,
        "maxfun": 20 * limits.max_iter,
        "ftol": 0.0,
        "gtol": _MIN_GRADIENT,
        "maxcor": _MEMORY,
    }
    result = minimize(
        value_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=after_iteration,
        options=options,
    )
    vector_to_parameters(torch.from_numpy(result.x.copy()), parameters)
    if not progress.log_likelihoods:  # the start is the minimum
        progress.is_over(latest["loss"], latest["log_likelihood"])
    # Success is a gradient of 0; status 2 is a line search that finds nothing lower.
    return has_settled or bool(result.success) or result.status == 2


def _descend(
    objective: _Objective, rows: Rows, progress: _Progress, generator: torch.Generator
) -> bool:
    """Minimise by Adam over batches of rows in a new order each time (Kingma and Ba 2015).

    Returns whether the loss settled.
    """
    parameters = list(objective.network.parameters())
    optimiser = torch.optim.Adam(parameters, objective.settings.learning_rate)
    weight = float(rows.sample_weight.sum())
    for _ in range(objective.settings.limits.max_iter):
        order = torch.randperm(len(rows.x), generator=generator)
        loss, log_likelihood = 0.0, 0.0
        for places in order.split(objective.settings.batch_size):
            batch = rows.batch(places)
            mean_loss, batch_log_likelihood = objective.training(batch, generator)
            total = mean_loss + objective.penalty(weight)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            share = float(batch.sample_weight.sum()) / weight
            loss += share * total.item()
            log_likelihood += share * batch_log_likelihood
        if progress.is_over(loss, log_likelihood):
            return True
    return False
