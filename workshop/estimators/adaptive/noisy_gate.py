"""Noisy top-k gating and its balancing losses (Shazeer et al. 2017, "Outrageously large neural
networks: the sparsely-gated mixture-of-experts layer", sections 2.1 and 4, appendix A).

While the gate is trained, each score has noise of its own, ``H_i = s_i + N(0, 1) softplus(n_i)``
(equation 4), and a row goes to the k experts of the largest H (equations 3 and 5). The noise lets a
row try an expert whose score is a little too small, and makes the number of an expert's rows a
smooth function of the scores. Prediction has no noise.

All tensors are float64. Dimension letters: N rows, E experts, k chosen experts of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def noisy_scores(scores: Tensor, raw_deviations: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``scores + N(0, 1) softplus(raw_deviations)`` [N, E] (equation 4)."""
    noise = torch.randn(scores.shape, generator=generator, dtype=scores.dtype)
    return scores + noise * softplus(raw_deviations)


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Return ``scores`` [N, E] with -inf beyond the ``top_k`` largest of each row (equation 5).

    Of equal scores the first is kept, as when the gate is served.
    """
    if top_k == scores.shape[1]:
        return scores
    order = scores.argsort(dim=1, descending=True, stable=True)
    is_dropped = torch.ones_like(scores, dtype=torch.bool)
    is_dropped.scatter_(1, order[:, :top_k], False)
    return scores.masked_fill(is_dropped, -torch.inf)


def chosen_probabilities(scores: Tensor, deviations: Tensor, noisy: Tensor, top_k: int) -> Tensor:
    """Return P [N, E], the probability that an expert is chosen under new noise of its own score.

    The ``noisy`` scores of the other experts stay as they are (equations 8 and 9):
    ``P_i = Phi((s_i - kth_excluding(H, k, i)) / softplus(n_i))``, with the latter as
    ``deviations``. ``top_k`` must be below E.
    """
    largest = noisy.topk(top_k + 1, dim=1).values
    last_in, first_out = largest[:, top_k - 1, None], largest[:, top_k, None]
    # Without expert i, the k-th largest is the next one where i itself is among the k.
    threshold = torch.where(noisy >= last_in, first_out, last_in)
    return torch.special.ndtr((scores - threshold) / deviations)


def squared_variation(amounts: Tensor) -> Tensor:
    """Return the squared coefficient of variation of ``amounts`` [E]: variance over squared mean.

    It is 0 for equal amounts, and 0 where all are 0.
    """
    mean = amounts.mean()
    if mean == 0:
        return amounts.new_zeros(())
    return amounts.var(unbiased=False) / mean.square()


def balancing_loss(amounts: Tensor, sample_weight: Tensor) -> Tensor:
    """Return CV² of the sums of ``amounts`` [N, E] over the rows.

    That of the gate's weights is the importance loss (equations 6 and 7), that of
    :func:`chosen_probabilities` the load loss (equations 10 and 11).
    """
    return squared_variation(sample_weight @ amounts)
