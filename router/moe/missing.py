"""Missing experts: which sequences of a step wait for them, and which go on without them.

An expert without a live copy is missing. The contract of a request, its ``on_expert_loss``,
decides about a row that chose a missing expert:

- ``strict``: the sequence waits. All of its rows are left out of the rest of the step, and no token
  is sampled for it.
- ``next_expert``: the live expert with the next best score takes the row. Where a whole layer is
  missing there is no such expert, and the sequence waits.
- ``drop``: the expert's share is left out. Where a whole layer is missing the row passes the layer
  by its residual connection, as GShard's overflowed tokens do (Lepikhin et al. 2020, section 2.2).

``next_expert`` and ``drop`` normalise the weights over the remaining experts, as the gate does.

Dimension letters: T tokens, K experts per token, E experts of the layer, H hidden size, W works.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from router.moe.gate import Choice, ChooseAmong

Awaited = tuple[int, int]
"""A missing expert that a sequence waits for: (layer, expert)."""
Tokens = slice | np.ndarray
"""Some tokens of a step, by their indices, which ascend."""
ALL_TOKENS = slice(None)
"""All tokens of a step."""


class StepMissing:
    """The record of one step with missing experts: which works wait, and which are inexact.

    ``awaited`` maps the index of a work to the experts that it waits for; such a work is computed
    again later. ``inexact`` are the indices of works with a row that was computed without an expert
    that the gate chose.
    """

    def __init__(
        self, sizes: Sequence[int], contracts: Sequence[str], needs_an_expert: bool = False
    ) -> None:
        """``sizes`` [W] are the works' numbers of tokens, in the order of the step's tokens.

        ``contracts`` [W] are their requests' ``on_expert_loss``. With ``needs_an_expert`` a token
        has no residual connection: a work with a token without any expert waits.
        """
        self._needs_an_expert = needs_an_expert
        self._waits = np.zeros(len(sizes), dtype=bool)  # [W]
        self._touched = np.zeros(sum(sizes), dtype=bool)  # of all tokens of the step
        self._places = np.arange(sum(sizes))  # [T], in the step
        self._owners = np.repeat(np.arange(len(sizes)), sizes)  # [T], indices of works
        self._contracts = np.array(contracts)[self._owners]  # [T]
        self.awaited: dict[int, frozenset[Awaited]] = {}
        self.inexact: set[int] = set()

    def of(self, tokens: Tokens) -> StepMissing:
        """Return the record of some of the step's tokens; both records share all results.

        A work that waits for an expert of these tokens waits with all of its tokens.
        """
        some = copy.copy(self)
        some._places, some._owners = self._places[tokens], self._owners[tokens]
        some._contracts = self._contracts[tokens]
        return some

    def choose(
        self,
        layer_id: int,
        missing: np.ndarray | None,
        choice: Choice,
        choose_among: ChooseAmong,
    ) -> Choice:
        """Return the choice of the T tokens without the ``missing`` experts [E].

        ``choice`` is the gate's. Records which works wait and which are inexact.
        """
        if missing is None and not self.awaited:
            return choice
        chosen = choice.served()
        if missing is None:
            return self._of_going(choice, chosen)
        hit = missing[choice.ids] & chosen & self._going()[:, None]  # [T, K]
        touched = hit.any(axis=1)
        would_wait = self._contracts == "strict"  # [T]
        if missing.all():
            would_wait |= self._contracts == "next_expert"
        self._await(layer_id, choice.ids, hit & would_wait[:, None])
        rows = np.flatnonzero(touched & self._going())
        if not len(rows):
            return self._of_going(choice, chosen)
        anew = self._without(missing, choice, chosen, choose_among, rows)
        if self._needs_an_expert:
            is_lost = np.zeros(len(touched), dtype=bool)
            is_lost[rows] = ~anew.served()[rows].any(axis=1)
            self._await(layer_id, choice.ids, hit & is_lost[:, None])
        rows = rows[self._going()[rows]]
        self.touch(rows)
        return self._of_going(anew, anew.served())

    def leave_out(self, layer_id: int, ids: np.ndarray, pairs: np.ndarray) -> None:
        """Let the works of ``pairs`` wait, whatever their contracts; their experts are away.

        ``ids`` [T, K] are the choices of the layer.
        """
        is_away = np.zeros(ids.shape, dtype=bool)
        is_away.ravel()[pairs] = True
        self._await(layer_id, ids, is_away)

    def passed_over(self, missing: np.ndarray) -> np.ndarray:
        """Return the ``missing`` experts [E] that each token goes past, bool [T, E].

        A token of a ``strict`` request goes past none: it waits.
        """
        return missing & (self._contracts != "strict")[:, None]

    def touch(self, rows: np.ndarray) -> None:
        """Record rows that are inexact since an expert had no room for them."""
        self._touched[self._places[rows]] = True
        self.inexact.update(self._owners[rows].tolist())

    def rows_by_contract(self) -> Counter[str]:
        """Return the number of inexact rows by contract, without the rows of works that wait."""
        kept = self._touched[self._places] & ~self._waits[self._owners]
        return Counter(self._contracts[kept].tolist())

    def _await(self, layer_id: int, ids: np.ndarray, waiting: np.ndarray) -> None:
        """Record the works of ``waiting`` pairs, bool [T, K], with the experts that they await."""
        tokens, ranks = waiting.nonzero()
        pairs = zip(self._owners[tokens].tolist(), ids[tokens, ranks].tolist(), strict=True)
        for index, expert_id in set(pairs):
            awaited = self.awaited.get(index, frozenset())
            self.awaited[index] = awaited | {(layer_id, expert_id)}
            self._waits[index] = True

    def _going(self) -> np.ndarray:
        """Return whether the work of each token goes on, bool [T]."""
        return ~self._waits[self._owners]

    def _of_going(self, choice: Choice, chosen: np.ndarray) -> Choice:
        """Return a choice with the ``chosen`` pairs, bool [T, K], of works that go on."""
        pairs = np.flatnonzero(chosen & self._going()[:, None])
        return Choice(choice.ids, choice.weights, pairs)

    def _without(
        self,
        missing: np.ndarray,
        choice: Choice,
        chosen: np.ndarray,
        choose_among: ChooseAmong,
        rows: np.ndarray,
    ) -> Choice:
        """Choose anew for ``rows``; the choices of other rows stay, bit for bit."""
        own = np.zeros((len(rows), len(missing)), dtype=bool)
        indices, ranks = chosen[rows].nonzero()
        own[indices, choice.ids[rows][indices, ranks]] = True
        allowed = ~missing & (own | (self._contracts[rows] != "drop")[:, None])  # [rows, E]
        return choose_anew(choice, chosen, rows, allowed, choose_among)


def choose_anew(
    choice: Choice,
    served: np.ndarray,
    rows: np.ndarray,
    allowed: np.ndarray,
    choose_among: ChooseAmong,
) -> Choice:
    """Choose for ``rows`` among ``allowed`` [rows, E]; the choices of other rows stay, bit for bit.

    ``served`` [T, K] are the pairs that are computed now. A row with fewer than K allowed experts
    is served only by these.
    """
    new = choose_among(rows, allowed)
    is_left = np.take_along_axis(allowed, new.ids, axis=1) & new.served()
    ids, served = choice.ids.copy(), served.copy()
    ids[rows], served[rows] = new.ids, is_left
    weights = choice.weights
    index = torch.from_numpy(rows)
    return Choice(
        ids,
        weights.index_copy(0, index, new.weights.to(weights.dtype)),
        np.flatnonzero(served),
    )
