"""What the loss of experts does to a step: who waits, and who goes on without them.

Experts without a live copy are lost. A row of a ``strict`` request that chose one makes its
sequence wait: all rows of the sequence are left out of the rest of the step and its tokens are not
sampled. The others go on: under ``next_expert`` the next live expert in line takes the token, under
``drop`` the lost share is left out; both normalise the weights over what is left, as the gate does.
Where a whole layer is lost there is no next expert, so ``next_expert`` waits like ``strict``; under
``drop`` the token then passes the layer by its residual connection, as GShard's overflowed tokens
do (Lepikhin et al. 2020, section 2.2).

Dimension letters: T tokens, K experts per token, E experts of the layer, H hidden size, W works.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.placement.placement import Placement
from router.control.placement_view import PlacementView
from router.moe.gate import ChooseAmong

Awaited = tuple[int, int]
"""An expert that has no live copy and is waited for: (layer, expert)."""


class LostExperts:
    """The experts of one model that have no live copy now; for the engine's thread alone."""

    def __init__(self, model: str, view: PlacementView) -> None:
        """``view`` tells which experts have a copy."""
        self._model = model
        self._view = view
        self._placement: Placement | None = None
        self._masks: dict[int, np.ndarray] = {}

    def of_layer(self, layer_id: int) -> np.ndarray | None:
        """Return which experts of a layer are lost, bool [E], or ``None`` when none is."""
        placement = self._view.current()
        if placement is not self._placement:
            self._placement = placement
            self._masks = {} if placement is None else lost_by_layer(placement, self._model)
        return self._masks.get(layer_id)

    def none_of(self, experts: Iterable[Awaited]) -> bool:
        """Return whether each of the (layer, expert) pairs has a live copy."""
        for layer_id, expert_id in experts:
            lost = self.of_layer(layer_id)
            if lost is not None and lost[expert_id]:
                return False
        return True


def lost_by_layer(placement: Placement, model: str) -> dict[int, np.ndarray]:
    """Return the lost experts, bool [E], of each layer that has any."""
    missing = [key for key in placement.missing() if key.model == model]
    sizes = Counter(key.layer_id for key in placement.holders if key.model == model)
    masks = {key.layer_id: np.zeros(sizes[key.layer_id], dtype=bool) for key in missing}
    for key in missing:
        masks[key.layer_id][key.expert_id] = True
    return masks


@dataclass(slots=True)
class Choice:
    """Which experts a layer's tokens go to: ids and weights [T, K].

    ``pairs`` are those of the T * K pairs that are computed at all; ``None`` is all of them.
    """

    ids: np.ndarray
    weights: torch.Tensor
    pairs: np.ndarray | None = None


class StepLoss:
    """The losses that one step met, and their consequences for its works.

    ``awaited`` has, by place in ``works``, the experts that a work waits for: what was computed for
    it is of no use. ``inexact`` has the places of those whose rows were computed without an expert
    that they chose. Nothing is built before the first loss, so a step without one costs nothing.
    """

    def __init__(self, sizes: Sequence[int], contracts: Sequence[str]) -> None:
        """``sizes`` [W] are the works' numbers of tokens, in the order of the step's tokens.

        ``contracts`` [W] are their requests' ``on_expert_loss``.
        """
        self._sizes = sizes
        self._contract_of_work = contracts
        self._waits = np.zeros(0, dtype=bool)  # [W]
        self._touched = np.zeros(0, dtype=bool)  # [T]
        self._owners = np.zeros(0, dtype=np.int64)  # [T], places in works
        self._contracts = np.zeros(0, dtype=str)  # [T]
        self.awaited: dict[int, frozenset[Awaited]] = {}
        self.inexact: set[int] = set()

    def choose(
        self,
        layer_id: int,
        lost: np.ndarray | None,
        hidden_states: torch.Tensor,
        choice: Choice,
        choose_among: ChooseAmong,
    ) -> Choice:
        """Return what the tokens [T, H] choose, given the gate's own choice and the lost [E].

        Notes which works wait and which are inexact.
        """
        if lost is None and not self.awaited:
            return choice
        self._set_up()
        going = ~self._waits[self._owners]  # [T]
        if lost is None:
            return Choice(choice.ids, choice.weights, _pairs(going, choice.ids.shape))
        hit = lost[choice.ids] & going[:, None]  # [T, K]
        touched = hit.any(axis=1)
        waits = self._contracts == "strict"
        if lost.all():
            waits |= self._contracts == "next_expert"
        self._await(layer_id, choice.ids, hit & waits[:, None])
        going = ~self._waits[self._owners]
        rows = np.flatnonzero(touched & going)
        if not len(rows):
            return Choice(choice.ids, choice.weights, _pairs(going, choice.ids.shape))
        self._touched[rows] = True
        self.inexact.update(self._owners[rows].tolist())
        return self._without(lost, hidden_states, choice, choose_among, rows, going)

    def touch(self, rows: np.ndarray) -> None:
        """Note tokens that were computed without an expert that they chose, for another reason."""
        self._set_up()
        self._touched[rows] = True
        self.inexact.update(self._owners[rows].tolist())

    def rows_by_contract(self) -> Counter[str]:
        """Return how many rows of works that do not wait were computed inexactly, by contract."""
        kept = self._touched & ~self._waits[self._owners]
        return Counter(self._contracts[kept].tolist())

    def _set_up(self) -> None:
        if len(self._waits):
            return
        num_works = len(self._sizes)
        self._waits = np.zeros(num_works, dtype=bool)
        self._touched = np.zeros(sum(self._sizes), dtype=bool)
        self._owners = np.repeat(np.arange(num_works), self._sizes)
        self._contracts = np.array(self._contract_of_work)[self._owners]

    def _await(self, layer_id: int, ids: np.ndarray, waiting: np.ndarray) -> None:
        """Have the works of the ``waiting`` pairs, bool [T, K], wait for the pairs' experts."""
        tokens, ranks = waiting.nonzero()
        found = zip(self._owners[tokens].tolist(), ids[tokens, ranks].tolist(), strict=True)
        for place, expert_id in set(found):
            awaited = self.awaited.get(place, frozenset())
            self.awaited[place] = awaited | {(layer_id, expert_id)}
            self._waits[place] = True

    def _without(
        self,
        lost: np.ndarray,
        hidden_states: torch.Tensor,
        choice: Choice,
        choose_among: ChooseAmong,
        rows: np.ndarray,
        going: np.ndarray,
    ) -> Choice:
        """Choose anew for ``rows``; the others' choices stay as they are, bit for bit."""
        own = np.zeros((len(rows), len(lost)), dtype=bool)
        np.put_along_axis(own, choice.ids[rows], True, axis=1)
        allowed = ~lost & (own | (self._contracts[rows] != "drop")[:, None])  # [rows, E]
        served = np.repeat(going[:, None], choice.ids.shape[1], axis=1)
        return choose_anew(choice, served, rows, allowed, hidden_states, choose_among)


def choose_anew(
    choice: Choice,
    served: np.ndarray,
    rows: np.ndarray,
    allowed: np.ndarray,
    hidden_states: torch.Tensor,
    choose_among: ChooseAmong,
) -> Choice:
    """Choose for ``rows`` among ``allowed`` [rows, E]; the others stay as they are, bit for bit.

    ``served`` [T, K] are the pairs that are computed now. Where fewer than K are allowed, only
    those are served.
    """
    device = hidden_states.device
    index = torch.from_numpy(rows).to(device)
    chosen, weights = choose_among(
        hidden_states.index_select(0, index), torch.from_numpy(allowed).to(device)
    )
    new_ids = chosen.cpu().numpy()
    is_left = np.take_along_axis(allowed, new_ids, axis=1)
    ids, served = choice.ids.copy(), served.copy()
    ids[rows], served[rows] = new_ids, is_left
    # Where none is left the gate divides by nothing.
    weights = weights.masked_fill(~torch.from_numpy(is_left).to(device), 0.0)
    return Choice(
        ids,
        choice.weights.index_copy(0, index, weights.to(choice.weights.dtype)),
        np.flatnonzero(served),
    )


def _pairs(going: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.flatnonzero(np.broadcast_to(going[:, None], shape))
