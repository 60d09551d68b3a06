"""Adaptive mixtures of local experts as scikit-learn estimators (Jacobs et al. 1991).

Dimension letters: N rows, E experts, F inputs, T steps of a sequence, W outputs, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sklearn.utils._param_validation import StrOptions

from workshop.estimators.adaptive.base import AdaptiveMixture
from workshop.estimators.base import MixtureClassifier, MixtureRegressor
from workshop.estimators.iterative import ABOVE_0, parameter


@dataclass(eq=False, repr=False)
class AdaptiveMixtureRegressor(MixtureRegressor, AdaptiveMixture):
    """A mixture of local experts for regression, fitted by gradient descent.

    A gate gives each row's experts weights p, the softmax of its scores, and an expert is a normal
    distribution around its output o. The competitive loss of a row with the target d is
    ``E = -log sum_i p_i exp(-1/2 ||d - o_i||^2)`` (Jacobs, Jordan, Nowlan and Hinton 1991,
    "Adaptive mixtures of local experts", equation 1.3), here with a standard deviation and the
    normalising constant, so that it is the negative log likelihood. An expert's gradient is
    ``-h_i (d - o_i)`` with the posterior h, so that experts specialise. The cooperative loss
    ``||d - sum_i p_i o_i||^2`` (equation 1.1) lets them share every row instead. The prediction is
    ``sum_i p_i o_i`` for both.

    Inputs and targets are standardised inside the fit; the fitted parts take raw rows.

    Parameters:

    - ``n_experts``: E.
    - ``experts``: ``"linear"``, ``"mlp"`` or ``"rnn"``; the latter takes rows [T, F]: an array
      [N, T, F], or a list of arrays whose T may differ.
    - ``hidden_layer_sizes``: of MLPs; of recurrent networks one size for each layer, all equal. A
      number is one layer's.
    - ``gate_hidden_layer_sizes``: empty for a linear gate.
    - ``activation``: ``"tanh"`` or ``"relu"``, of MLPs.
    - ``cell``: ``"plain"``, ``"gru"`` or ``"lstm"``, of recurrent networks, or a list of these
      with one for each expert.
    - ``pool``: the vector that the gate sees of a sequence: the ``"mean"`` or the ``"last"`` of its
      steps, or all steps (``"flatten"``), whose number is then fixed.
    - ``loss``: ``"competitive"`` or ``"cooperative"``. A cooperative mixture has no likelihood of
      single experts; its log likelihood is that of a normal distribution around the sum.
    - ``deviation``: the experts' standard deviation: ``"shared"`` fits one for all experts and
      outputs, ``"expert"`` one for each expert, both in units of each output's own deviation; a
      number gives it in the targets' units.
    - ``top_k``: the number of experts that a row is given to at prediction; ``None`` is all.
      Without a noisy gate all experts are trained with their full weights.
    - ``noisy_gate``: noisy top-k gating (Shazeer et al. 2017) while training: random noise of a
      fitted size is added to the scores, and only ``top_k`` experts of a row have weight.
      ``log_likelihoods_`` are then those under the noise.
    - ``importance_weight``, ``load_weight``: the factors w of the losses ``w CV^2`` of the experts'
      importance and load, which keep experts from starving.
    - ``init``: ``"kmeans"`` begins with a cluster of rows for each expert, ``"random"`` with small
      random weights, as in 1991.
    - ``n_init``: the number of starts, of which the likeliest result is kept.
    - ``solver``: ``"lbfgs"``, or ``"adam"`` with ``learning_rate`` and ``batch_size`` (``"auto"``
      is 200); ``"auto"`` is Adam for a noisy gate, otherwise L-BFGS.
    - ``alpha``: the factor of the penalty ``alpha / (2 N) ||weights||^2``, without biases. A large
      one makes the gate soft, as few rows with much noise want it; a small one lets it be sharp.
    - ``max_iter``: iterations of L-BFGS, or passes of Adam over the rows. The fit ends earlier when
      ``n_iter_no_change`` iterations in a row lower the loss by less than ``tol``.
    - ``early_stopping``: judge by the loss of a ``validation_fraction`` of the rows, and keep the
      weights that are best for them.
    - ``warm_start``: continue from the fitted mixture, with one start. The noise begins anew.
    - ``n_jobs``: processes for the starts; the result does not depend on it.
    - ``random_state``: a fit with the same number and the same data has the same result.
    - ``verbose``: 1 shows a progress bar.
    """

    deviation: Literal["shared", "expert"] | float = parameter(
        "shared", StrOptions({"shared", "expert"}), ABOVE_0
    )


class AdaptiveMixtureClassifier(MixtureClassifier, AdaptiveMixture):
    """A mixture of local experts for classification, fitted by gradient descent.

    An expert's probabilities P are the softmax of its outputs. The competitive loss of a row of the
    class c is the negative log likelihood ``-log sum_i p_i P_i(c)``, the likelihood form of
    equation 1.3 of Jacobs et al. 1991. The cooperative loss is ``||d - sum_i p_i P_i||^2``
    (equation 1.1), where d is 1 for the row's class and 0 for the others. The prediction is
    ``sum_i p_i P_i`` for both.

    The parameters are those of :class:`AdaptiveMixtureRegressor`, without ``deviation``.
    """
