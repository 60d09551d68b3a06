"""The gate: decides which experts a token goes to, and with which weights.

One class serves every family, by its :class:`experts.families.base.GateSpec`. It takes the place of
transformers' gate and gives the same ids and weights bit for bit in torch; its native form
(:class:`router.model.cpu.native_layer.NativeGate`) has an order of sums of its own. It can also
choose without some experts: missing experts, and experts without room.

Dimension letters: T tokens, H hidden size, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cluster.wire.tensors import MicrobatchBuffers, to_ids
from experts.families.base import GateSpec

_MIN_SUM = 1e-20
"""Added to the sum of sigmoids, which may be 0; the value is DeepSeek-V3's."""


class Gate:
    """Scores the experts of one layer and chooses the K best of each token."""

    def __init__(
        self,
        spec: GateSpec,
        top_k: int,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        correction: torch.Tensor | None = None,
        *,
        has_native_logits: bool = False,
    ) -> None:
        """``logits_of`` maps hidden states [T, H] to logits [T, E].

        ``correction`` [E] is added to the scores for the choice, not for the weights (DeepSeek-V3,
        arXiv 2412.19437, section 2.1.2). ``has_native_logits`` says that native code computes
        ``logits_of``.
        """
        self._spec = spec
        self._top_k = top_k
        self._logits_of = logits_of
        self.has_native_logits = has_native_logits
        """Whether a row's logits have the same bits in any batch."""
        self._scores_dtype = torch.float32 if "scores" in spec.float32 else None
        self._rounds_weights = "scores" in spec.float32 and "weights" not in spec.float32
        self._correction = None if correction is None else correction.float()
        self._on_host = None if self._correction is None else self._correction.cpu()
        self._lowest = -1.0 if self._on_host is None else float(self._on_host.min()) - 1.0

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, E] of hidden states [T, H], on their device."""
        in_float32 = "logits" in self._spec.float32
        return self._logits_of(hidden_states.float() if in_float32 else hidden_states)

    def choose(
        self,
        hidden_states: torch.Tensor,
        allowed: torch.Tensor | None = None,
        forced: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids, int64, and weights of the K best experts of each of the hidden states [T, H].

        With ``allowed``, bool [T, E], the K best of the allowed experts are chosen (GShard,
        Lepikhin et al. 2020, section 2.2), and weights are normalised over them. Where a row is
        allowed fewer than K experts, other ids fill it, with a weight of 0.

        ``forced`` ids, int64 [T, K], take the place of the best experts, with the weights that
        these would have for the same scores; rows of -1 choose freely.
        """
        return self.choose_by(self.logits(hidden_states), hidden_states.dtype, allowed, forced)

    def choose_by(
        self,
        logits: torch.Tensor,
        dtype: torch.dtype,
        allowed: torch.Tensor | None = None,
        forced: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`choose` returns for the hidden states of these logits [T, E].

        ``dtype`` is that of the hidden states. The logits may have come from a device to the host;
        ``allowed`` and ``forced`` are where they are.
        """
        scores = self._scores(logits, allowed)
        choice_scores = self._choice_scores(scores, allowed)
        values, ids = choice_scores.topk(self._top_k, -1, True, self._spec.sorts)
        # What was chosen by are the scores themselves, unless a mask or a correction changed them.
        are_scores = allowed is None and self._correction is None and forced is None
        if forced is not None:
            ids = torch.where(forced < 0, ids, forced)
        weights = self._weights(values if are_scores else scores.gather(1, ids))
        if allowed is not None:
            # Last, because a row without an allowed expert divides by 0 before.
            weights = weights.masked_fill(~allowed.gather(1, ids), 0.0)
        return ids, weights.to(dtype) if self._rounds_weights else weights

    def choice(
        self,
        hidden_states: torch.Tensor,
        forced: np.ndarray | None = None,
        *,
        room: MicrobatchBuffers | None = None,
    ) -> Choice:
        """Return the choice of :meth:`choose` for hidden states [T, H] of the host.

        It may be in ``room``, the memory of their piece.
        """
        given = None if forced is None else torch.from_numpy(forced)
        ids, weights = self.choose(hidden_states, forced=given)
        return Choice(to_ids(ids), weights)

    def choose_anew(
        self, hidden_states: torch.Tensor, rows: np.ndarray, allowed: np.ndarray
    ) -> Choice:
        """Choose for some of the hidden states [T, H] of the host; see `ChooseAmong`."""
        some = hidden_states.index_select(0, torch.from_numpy(rows))
        ids, weights = self.choose(some, torch.from_numpy(allowed))
        return Choice(to_ids(ids), weights)

    def _scores(self, logits: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Return scores [T, E]; a softmax is over all experts, or over the allowed experts."""
        spec = self._spec
        if allowed is not None and not spec.weights_are_of_all:
            # Before the softmax, where the large score of a forbidden expert rounds others to 0.
            logits = logits.masked_fill(~allowed, -torch.inf)
        if spec.score == "softmax":
            return logits.softmax(-1, dtype=self._scores_dtype)
        return logits.sigmoid() if spec.score == "sigmoid" else logits

    def _choice_scores(self, scores: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Return the scores [T, E] by which experts are chosen, not weighted."""
        correction = self._on_host if scores.is_cpu else self._correction
        if correction is not None:
            scores = scores + correction
        if allowed is not None:
            scores = scores.masked_fill(~allowed, self._below_all())
        if self._spec.topk_groups < self._spec.num_groups:
            scores = self._of_best_groups(scores, allowed)
        return scores

    def _below_all(self) -> float:
        """Return a score for the choice below every allowed expert's.

        It is finite for the sums of groups: a group with an allowed expert has a larger sum than
        one without.
        """
        if self._spec.score == "softmax_of_chosen":
            return -torch.inf
        return self._lowest

    def _of_best_groups(self, scores: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Return the scores [T, E] with those of all but the best groups made lowest.

        A row with at most K allowed experts may take them from all groups.
        """
        spec = self._spec
        groups = scores.unflatten(1, (spec.num_groups, -1))  # [T, G, E / G]
        group_scores = groups.topk(spec.best_of_group, dim=-1).values.sum(dim=-1)  # [T, G]
        best = group_scores.topk(spec.topk_groups, dim=-1, sorted=False).indices
        left_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        if allowed is not None:
            left_out &= allowed.sum(dim=1, keepdim=True) > self._top_k
        # transformers' DeepSeek-V2 has 0 here, a tie with experts whose share rounds to 0.
        lowest = 0.0 if allowed is None and spec.score == "softmax" else -torch.inf
        return groups.masked_fill(left_out.unsqueeze(-1), lowest).flatten(1)

    def _weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the weights [T, K] for the scores of the chosen experts."""
        spec = self._spec
        if spec.score == "softmax_of_chosen":
            scores = scores.softmax(-1)
        if spec.norm_exponent is not None:
            norm = torch.linalg.vector_norm(scores, spec.norm_exponent, dim=-1, keepdim=True)
            scores = scores / norm
        if spec.renormalises:
            total = scores.sum(-1, keepdim=True)
            scores = scores / (total + _MIN_SUM if spec.score == "sigmoid" else total)
        return scores if spec.scaling_factor == 1.0 else scores * spec.scaling_factor


class ForcedGate:
    """A layer's gate for tokens of which some go to experts that their requests name."""

    def __init__(self, gate: Gate, forced: torch.Tensor) -> None:
        """``forced`` are ids, int64 [T, K], or rows of -1 for tokens that choose freely.

        They are on the device of the hidden states.
        """
        self._gate = gate
        self._forced = forced

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See :meth:`Gate.logits`."""
        return self._gate.logits(hidden_states)

    def choose_by(
        self, logits: torch.Tensor, dtype: torch.dtype, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Gate.choose_by`; ``allowed`` experts stand for what is forced."""
        forced = self._forced if allowed is None else None
        return self._gate.choose_by(logits, dtype, allowed, forced)

    def choice(
        self, hidden_states: torch.Tensor, *, room: MicrobatchBuffers | None = None
    ) -> Choice:
        """See :meth:`Gate.choice`."""
        return self._gate.choice(hidden_states, self._forced.numpy(), room=room)

    def choose_anew(
        self, hidden_states: torch.Tensor, rows: np.ndarray, allowed: np.ndarray
    ) -> Choice:
        """See :meth:`Gate.choose_anew`; the ``allowed`` experts stand for what is forced."""
        return self._gate.choose_anew(hidden_states, rows, allowed)


@dataclass(slots=True)
class Choice:
    """The experts of a layer's tokens: ids [T, K], int64 and contiguous, and weights [T, K].

    ``pairs`` are the computed pairs of the T * K pairs; ``None`` is all of them.
    """

    ids: np.ndarray
    weights: torch.Tensor
    pairs: np.ndarray | None = None

    def served(self) -> np.ndarray:
        """Return whether each pair is computed, bool [T, K]."""
        if self.pairs is None:
            return np.ones(self.ids.shape, dtype=bool)
        served = np.zeros(self.ids.size, dtype=bool)
        served[self.pairs] = True
        return served.reshape(self.ids.shape)


ChooseAmong = Callable[[np.ndarray, np.ndarray], Choice]
"""Chooses anew for some rows of a layer, int64 [R], among the experts allowed to them, bool [R, E].

Weights are normalised over the allowed experts; the choice may name others with a weight of 0.
"""
