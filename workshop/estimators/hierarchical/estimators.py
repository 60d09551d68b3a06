"""Hierarchical mixtures of experts as scikit-learn estimators (Jordan and Jacobs 1994).

Dimension letters: N rows, F features, D outputs of a regression, K classes, E experts, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workshop.estimators.base import MixtureClassifier, MixtureRegressor, Targets
from workshop.estimators.hierarchical.base import NEWTON_STEPS, HierarchicalMixture
from workshop.estimators.hierarchical.tree import GaussianLeaves, SoftmaxLeaves
from workshop.estimators.iterative import ABOVE_0, AT_LEAST_1, parameter
from workshop.estimators.parts import Array
from workshop.estimators.scale import Scale


@dataclass(eq=False, repr=False)
class HierarchicalMixtureRegressor(MixtureRegressor, HierarchicalMixture):
    """A tree of softmax gates over linear experts, fitted by expectation-maximisation.

    A row's density is ``P(y | x) = sum_i g_i(x) sum_j g_{j|i}(x) P_ij(y | x)`` (Jordan and Jacobs
    1994, "Hierarchical mixtures of experts and the EM algorithm"), here for any depth.
    The gates g are softmax regressions, and an expert is a normal distribution around a linear
    function, with a variance for each output. The E step computes the posteriors
    ``h_i h_{j|i}`` along the tree. The M step fits each expert by weighted
    least squares and each gate by iteratively reweighted least squares. The prediction is the
    mean ``sum_i g_i sum_j g_{j|i} mu_ij``.

    The objective is the mean log likelihood of a row, by weight, plus the log density of a prior
    over the coefficients and variances, divided by the sum of weights. The prior of an expert's
    coefficient is ``N(0, 1 / ridge)``, that of a gate's is ``N(0, 1 / gate_ridge)``, both of
    standardised inputs and targets, so that collinear columns and starved experts are defined: an
    expert without rows predicts the mean of the targets. A variance's prior weighs as much as a
    tenth of a row. The objective never falls; ``fit`` raises ``ArithmeticError`` if it does by more
    than rounding.

    Inputs and targets are standardised inside the fit; the fitted parts take raw rows.

    Parameters:

    - ``branching``: the choices of the gates, one number for each level from the root down; E is
      their product.
    - ``top_k``: the choices that a gate keeps at prediction, whose weights add up to 1 again: one
      number for all levels, or one for each; ``None`` is all. The fit uses all of them.
    - ``ridge``, ``gate_ridge``: the precisions of the priors, above 0. A smaller ``gate_ridge``
      allows sharper borders between pieces.
    - ``min_variance``: the least variance of an expert, as a share of the target's.
    - ``n_init``: the number of starts, half of them by linear pieces and half by cells of the
      inputs. Each is fitted to its end, and the best result is kept.
    - ``max_iter``: the most iterations of EM. The fit ends earlier when ``n_iter_no_change``
      iterations in a row raise the objective by less than ``tol``.
    - ``early_stopping``: judge by the log likelihood of a ``validation_fraction`` of the rows, and
      keep the tree that is best for them.
    - ``warm_start``: continue from the fitted mixture, with one start.
    - ``n_jobs``: processes for the starts; the result does not depend on it.
    - ``random_state``: a fit with the same number and the same data has the same result. Without
      early stopping the order of rows changes nothing, and a row of weight 2 equals two rows.
    - ``verbose``: 1 shows a progress bar.

    ``log_likelihoods_`` [n_iter_] is the objective after each iteration; ``log_likelihood_`` is
    that of the mixture as it predicts, with ``top_k`` and without the priors.
    ``validation_scores_`` [n_iter_] is the log likelihood of the rows of early stopping.
    """

    gate_ridge: float = parameter(0.01, ABOVE_0)
    min_variance: float = parameter(1e-6, ABOVE_0)
    n_init: int = parameter(8, AT_LEAST_1)

    def _fit_targets(self, targets: Targets, scale: Scale) -> Array:
        return scale(targets)

    def _empty_leaves(self, num_experts: int, penalty: Array) -> GaussianLeaves:
        coefficients = np.zeros((num_experts, len(penalty), self._width))
        variances = np.ones((num_experts, self._width))
        return GaussianLeaves(coefficients, variances, penalty, float(self.min_variance))


@dataclass(eq=False, repr=False)
class HierarchicalMixtureClassifier(MixtureClassifier, HierarchicalMixture):
    """A tree of softmax gates over softmax experts, fitted by expectation-maximisation.

    The tree, the objective and the parameters are those of :class:`HierarchicalMixtureRegressor`.
    An expert is a softmax regression, a generalised linear model of the multinomial density. It is
    fitted by Newton's method, and the prior of its coefficients is ``N(0, 1 / ridge)``. So a class
    that an expert never saw has a small probability, never 0, and an expert without rows gives all
    classes the same. The prediction is ``sum_i g_i sum_j g_{j|i} P_ij``.
    """

    n_init: int = parameter(6, AT_LEAST_1)

    def _fit_targets(self, targets: Targets, scale: Scale) -> Array:
        return np.eye(self._width)[targets]

    def _empty_leaves(self, num_experts: int, penalty: Array) -> SoftmaxLeaves:
        coefficients = np.zeros((len(penalty), num_experts, self._width))
        return SoftmaxLeaves(coefficients, penalty, NEWTON_STEPS)
