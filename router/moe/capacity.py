"""Expert capacity: how many of a step's tokens an expert takes, and which experts take the rest.

After GShard (Lepikhin et al. 2020, arXiv 2006.16668, section 2.2): each expert takes at most its
capacity of a batch's tokens. The first choices of all tokens are placed before all second choices,
in the order of the tokens. A token whose expert is full goes to its next expert by the gate's
probability. A token that finds no room at all passes the layer by its residual connection. The
capacity bounds the work of the busiest expert in a step, and so the step's time.

Dimension letters: T tokens, K experts per token, E experts of the layer, H hidden size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from router.config.capacity import CapacityConfig
from router.moe.gate import Choice, ChooseAmong
from router.moe.missing import StepMissing, choose_anew


def tokens_per_expert(config: CapacityConfig, num_pairs: int, num_experts: int) -> int:
    """Return the capacity of an expert in a step of ``num_pairs`` choices; at least 1."""
    if config.tokens is not None:
        return config.tokens
    assert config.factor is not None
    return max(1, math.ceil(config.factor * num_pairs / num_experts))


@dataclass(frozen=True, slots=True)
class Placed:
    """A layer's choice within the capacity.

    ``rows`` are the tokens that did not get the experts of the gate's choice. ``overflow`` [E]
    counts the tokens that each expert had no room for.
    """

    choice: Choice
    rows: np.ndarray
    overflow: np.ndarray


class CapacityLimit:
    """Holds one model's layers to a capacity, and counts the overflow.

    ``overflow`` counts, by (layer, expert), the tokens that an expert had no room for. The engine's
    thread alone writes it; any thread may read it.
    """

    def __init__(self, config: CapacityConfig, num_experts: int) -> None:
        """``num_experts`` is the number of experts in each layer."""
        self._config = config
        self._none_missing = np.zeros(num_experts, dtype=bool)
        self.overflow: Counter[tuple[int, int]] = Counter()

    def apply(
        self,
        layer_id: int,
        choice: Choice,
        missing: np.ndarray | None,
        record: StepMissing,
        choose_among: ChooseAmong,
    ) -> Choice:
        """Return the experts of the T tokens; ``record`` notes the changed choices.

        It also notes the chunks that wait: a ``strict`` one whose token's next expert is missing.
        """
        passed_over = self._none_missing if missing is None else record.passed_over(missing)
        num_pairs = choice.ids.size if choice.pairs is None else len(choice.pairs)
        capacity = tokens_per_expert(self._config, num_pairs, len(self._none_missing))
        placed = within_capacity(choice, capacity, passed_over, choose_among)
        if not len(placed.rows):
            return choice
        record.touch(placed.rows)
        for expert_id in placed.overflow.nonzero()[0].tolist():
            self.overflow[layer_id, expert_id] += int(placed.overflow[expert_id])
        return record.choose(layer_id, missing, placed.choice, choose_among)


class _Room:
    """The experts of each token that have room, filled one preference after the other."""

    def __init__(self, num_tokens: int, wanted: np.ndarray, capacity: int, missing: np.ndarray):
        self._wanted = wanted  # [T], the number of experts that each token wants
        self._capacity = capacity
        num_experts = missing.shape[-1]
        self._counts = np.zeros(num_experts, dtype=np.int64)  # [E]
        self.overflow = np.zeros(num_experts, dtype=np.int64)  # [E]
        self.has = np.zeros((num_tokens, num_experts), dtype=bool)  # [T, E]
        # Missing experts have no room.
        self.tried = np.broadcast_to(missing, self.has.shape).copy()  # [T, E]

    def lacking(self) -> np.ndarray:
        """Return the tokens that lack an expert and have not tried all experts."""
        lacks = (self.has.sum(axis=1) < self._wanted) & ~self.tried.all(axis=1)
        return np.flatnonzero(lacks)

    def ask(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        """Place each of ``tokens``, ascending, with its one of ``experts`` if there is room.

        Tokens that have all the experts that they want are skipped.
        """
        lacks = self.has[tokens].sum(axis=1) < self._wanted[tokens]
        tokens, experts = tokens[lacks], experts[lacks]
        by_expert = np.argsort(experts, kind="stable")
        ordered = experts[by_expert]
        before = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        fits = np.empty(len(tokens), dtype=bool)
        fits[by_expert] = self._counts[ordered] + before < self._capacity
        self.tried[tokens, experts] = True
        self.has[tokens[fits], experts[fits]] = True
        self._counts += np.bincount(experts[fits], minlength=len(self._counts))
        self.overflow += np.bincount(experts[~fits], minlength=len(self._counts))


def within_capacity(
    choice: Choice,
    capacity: int,
    missing: np.ndarray,
    choose_among: ChooseAmong,
) -> Placed:
    """Return the choice of the T tokens when each expert takes at most ``capacity`` of them.

    ``missing`` experts, [E] or [T, E] by token, take no tokens. Where every expert has room the
    choice is returned unchanged. Otherwise no expert exceeds its capacity, and no token passes over
    an expert that it prefers and that has room. The weights of a token with changed experts are
    normalised over its new experts, as the gate does.
    """
    num_tokens, num_experts = len(choice.ids), missing.shape[-1]
    served = choice.served()
    demand = np.bincount(choice.ids[served], minlength=num_experts)
    if demand.max() <= capacity:
        return Placed(choice, np.zeros(0, dtype=np.int64), np.zeros(num_experts, dtype=np.int64))
    room = _Room(num_tokens, served.sum(axis=1), capacity, missing)
    weights = choice.weights.float().numpy()
    for tokens, experts in _in_line(np.arange(num_tokens), choice.ids, weights, served):
        room.ask(tokens, experts)
    before = -1
    # The loop also ends when the gate names no new expert, as it does for scores that are NaN.
    while (tried := int(room.tried.sum())) > before and len(lacking := room.lacking()):
        before = tried
        for tokens, experts in _next(lacking, ~room.tried[lacking], choose_among):
            room.ask(tokens, experts)
    own = np.zeros_like(room.has)
    own[served.nonzero()[0], choice.ids[served]] = True
    moved = np.flatnonzero((room.has != own).any(axis=1))
    allowed = room.has[moved]
    return Placed(
        choose_anew(choice, served, moved, allowed, choose_among),
        moved,
        room.overflow,
    )


def _next(
    tokens: np.ndarray, allowed: np.ndarray, choose_among: ChooseAmong
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the next experts of ``tokens`` among the ``allowed`` experts, rank by rank."""
    chosen = choose_among(tokens, allowed)
    shares = chosen.weights.float().numpy()
    yield from _in_line(tokens, chosen.ids, shares, shares > 0)


def _in_line(
    tokens: np.ndarray, ids: np.ndarray, weights: np.ndarray, valid: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens with one expert each, likeliest experts first; only ``valid`` [T, K] pairs."""
    order = np.argsort(np.where(valid, -weights, np.inf), axis=1, kind="stable")
    for rank in order.T:
        rows = np.arange(len(tokens))
        counts = valid[rows, rank]
        yield tokens[counts], ids[rows, rank][counts]
