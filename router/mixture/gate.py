"""The gates of a mixture: a tree of them chooses each row's experts, with weights.

The root gives a row to its best choices, gates or experts, and each of these gates does the same. A
choice's weight is the softmax of its score, and an expert's weight is the product of the weights
along its path (Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm",
section 2). A gate is computed for the rows that reach it, and for no other row.

A row's choice and weights have the same bits alone and in any batch, so that no row near a tie
changes its expert with its batch mates.

Dimension letters: T rows, E experts, K most experts of a row, C choices of a gate, R rows that
reach a gate, F values that a gate looks at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import InvalidRequestError, NotFiniteError
from experts.checkpoint.mixture import Mixture
from experts.mixture.parts import GivenGate
from experts.mixture.spec import most_experts
from router.mixture.scores import Scores, best_choices, read_scores
from router.mixture.sums import sum_first
from router.moe.gate import Choice, ChooseAmong

_Chosen = tuple[np.ndarray, np.ndarray]
"""The choices of a gate: bool [R, C], and their weights [R, C], which count where chosen."""


class MixtureGate:
    """Chooses the experts of rows. Immutable, so that any thread may use it.

    ``num_experts`` is E, ``max_chosen`` is K.
    """

    def __init__(self, mixture: Mixture) -> None:
        """Read the gates' files.

        Raises :class:`CheckpointError`, whose field is the file and the gate, for a tensor that is
        missing, of a wrong shape or dtype, not finite or not used.
        """
        spec = mixture.spec
        self.num_experts = len(spec.experts)
        self.max_chosen = most_experts(spec)
        self._dtype = np.dtype(spec.dtype)
        ids = {name: expert_id for expert_id, name in enumerate(spec.experts)}

        def node(name: str) -> _Node:
            gate = spec.gates[name]
            experts = np.array([ids.get(choice, -1) for choice in gate.choices], np.int64)
            gates = {c: node(choice) for c, choice in enumerate(gate.choices) if choice not in ids}
            if isinstance(gate, GivenGate):
                return _GivenNode(name, experts, gates, gate.input, gate.column)
            scores = read_scores(mixture, name, gate)
            return _ScoringNode(name, experts, gates, scores, gate.num_chosen, gate.renormalize)

        self._root = node(spec.gate)

    def choose(self, inputs: Mapping[str, np.ndarray], first_row: int = 0) -> Choice:
        """Return the experts of T rows, ascending by number in each row, with their weights.

        ``inputs`` are arrays [T, *shape] by name, of the inputs' datatypes; those that no gate
        looks at may be absent. Weights have the mixture's dtype. Where a row has fewer than K
        experts, its last one fills the row with a weight of 0; such pairs are not in ``pairs``. Of
        equal scores the choice that is listed first wins.

        Raises :class:`InvalidRequestError` for a given choice that does not exist, and
        :class:`NotFiniteError` for scores that are NaN or infinite. Either names the first such
        row of a gate, counted from ``first_row``.
        """
        num_rows = len(next(iter(inputs.values())))
        numbers = np.arange(first_row, first_row + num_rows)
        return self._choose(_Walk(inputs, self._dtype, numbers))

    def reselect(self, inputs: Mapping[str, np.ndarray], first_row: int = 0) -> ChooseAmong:
        """Return the choice anew for some rows of :meth:`choose`, among experts allowed to them.

        Choices are out that lead a row to no allowed expert, and weights are normalised over the
        others. A row without any allowed expert has no pairs.
        """

        def choose_among(rows: np.ndarray, allowed: np.ndarray) -> Choice:
            some = {name: array[rows] for name, array in inputs.items()}
            return self._choose(_Walk(some, self._dtype, rows + first_row, allowed))

        return choose_among

    def _choose(self, walk: _Walk) -> Choice:
        with np.errstate(all="ignore"):  # scores that are not finite raise an error of their own
            walk.descend(self._root, np.arange(walk.num_rows), None)
        return walk.choice(self.max_chosen)


@dataclass(frozen=True, slots=True)
class _Node:
    """One gate: ``experts`` [C] are its choices' numbers, -1 for those of ``gates`` by place."""

    name: str
    experts: np.ndarray
    gates: Mapping[int, _Node]

    def choose(self, walk: _Walk, rows: np.ndarray, is_open: np.ndarray | None) -> _Chosen:
        """Choose for the rows [R] among the open choices, bool [R, C]; ``None`` is all."""
        raise NotImplementedError

    def open_choices(self, walk: _Walk, allowed: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the choices that lead the rows [R] to an allowed expert, bool [R, C].

        ``allowed`` is bool [N, E], by row and expert.
        """
        is_open = allowed[rows[:, None], self.experts]
        for place, below in self.gates.items():
            is_open[:, place] = below.open_choices(walk, allowed, rows).any(axis=1)
        return is_open


@dataclass(frozen=True, slots=True)
class _ScoringNode(_Node):
    scores: Scores
    num_chosen: int
    renormalize: bool

    def choose(self, walk: _Walk, rows: np.ndarray, is_open: np.ndarray | None) -> _Chosen:
        scores = self.scores(walk.vectors(self.scores.input, self.scores.pool, rows))  # [R, C]
        is_finite = np.isfinite(scores)
        if not is_finite.all():
            row = walk.numbers[rows[np.flatnonzero(~is_finite.all(axis=1))[0]]]
            raise NotFiniteError(f"scores of row {row} are NaN or infinite", f"gates.{self.name}")
        if is_open is not None:
            scores = np.where(is_open, scores, -np.inf)
        is_chosen = best_choices(scores, self.num_chosen)
        if is_open is not None:
            is_chosen &= is_open
        # A row without an open choice has nothing but -inf.
        largest = np.maximum(scores.max(axis=1, keepdims=True), np.finfo(scores.dtype).min)
        shares = np.exp(scores - largest)
        counted = np.where(is_chosen, shares, 0) if self.renormalize else shares
        total = sum_first(np.array(counted.T, order="C"))[:, None]
        return is_chosen, shares / np.where(total > 0, total, 1).astype(shares.dtype)


@dataclass(frozen=True, slots=True)
class _GivenNode(_Node):
    input: str
    column: int

    def choose(self, walk: _Walk, rows: np.ndarray, is_open: np.ndarray | None) -> _Chosen:
        given = self._given(walk, rows)
        num_choices = len(self.experts)
        wrong = np.flatnonzero((given < 0) | (given >= num_choices))
        if len(wrong):
            raise InvalidRequestError(
                f"row {walk.numbers[rows[wrong[0]]]}, column {self.column}: gate {self.name!r} has "
                f"no choice {given[wrong[0]]}; allowed: 0 to {num_choices - 1}",
                f"inputs.{self.input}",
            )
        is_chosen = given[:, None] == np.arange(num_choices)
        if is_open is not None:
            is_chosen &= is_open
        return is_chosen, np.ones(is_chosen.shape, walk.dtype)

    def open_choices(self, walk: _Walk, allowed: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return only the given choice; none for a value that names no choice.

        A row may have such a value where its first choice did not reach this gate.
        """
        below = _Node.open_choices(self, walk, allowed, rows)
        return below & (self._given(walk, rows)[:, None] == np.arange(len(self.experts)))

    def _given(self, walk: _Walk, rows: np.ndarray) -> np.ndarray:
        given: np.ndarray = _flat(walk.inputs[self.input])[rows, self.column]
        return given


class _Walk:
    """One choice: the rows on their way down the tree, and the experts that they have reached.

    ``numbers`` [T] are the rows' numbers in errors.
    """

    def __init__(
        self,
        inputs: Mapping[str, np.ndarray],
        dtype: np.dtype,
        numbers: np.ndarray,
        allowed: np.ndarray | None = None,
    ) -> None:
        self.inputs = inputs
        self.dtype = dtype
        self.numbers = numbers
        self.num_rows = len(numbers)
        self.allowed = allowed
        self._vectors: dict[tuple[str, str], np.ndarray] = {}
        none = np.empty(0, np.int64)
        # Rows, ids and weights, of which there may be no others.
        self._found = [(none, none, np.empty(0, dtype))]

    def vectors(self, name: str, pool: str, rows: np.ndarray) -> np.ndarray:
        """Return an input's values [R, F] of the rows, in the mixture's dtype."""
        vectors = self._vectors.get((name, pool))
        if vectors is None:
            pooled = _pooled(self.inputs[name], pool, self.dtype, f"inputs.{name}")
            vectors = self._vectors[name, pool] = pooled
        return vectors if len(rows) == self.num_rows else vectors[rows]

    def descend(self, node: _Node, rows: np.ndarray, weights: np.ndarray | None) -> None:
        """Lead ``rows`` [R] through a gate and those below; ``weights`` [R] are of their paths."""
        allowed = self.allowed
        is_open = None if allowed is None else node.open_choices(self, allowed, rows)
        is_chosen, shares = node.choose(self, rows, is_open)
        if weights is not None:
            shares = shares * weights[:, None]
        at_expert = is_chosen & (node.experts >= 0) if node.gates else is_chosen
        members, places = at_expert.nonzero()
        self._found.append((rows[members], node.experts[places], shares[members, places]))
        for place, below in node.gates.items():
            members = is_chosen[:, place].nonzero()[0]
            if len(members):
                self.descend(below, rows[members], shares[members, place])

    def choice(self, max_chosen: int) -> Choice:
        """Return the reached experts, by row and by number, as [T, K]."""
        rows, ids, weights = (np.concatenate(part) for part in zip(*self._found, strict=True))
        is_next = (rows[1:] > rows[:-1]) | ((rows[1:] == rows[:-1]) & (ids[1:] > ids[:-1]))
        if not is_next.all():
            order = np.lexsort((ids, rows))
            rows, ids, weights = rows[order], ids[order], weights[order]
        shape = (self.num_rows, max_chosen)
        if len(ids) == self.num_rows * max_chosen:
            return Choice(ids.reshape(shape), torch.from_numpy(weights.reshape(shape)))
        counts = np.bincount(rows, minlength=self.num_rows)[:, None]  # [T, 1]
        ranks = np.arange(max_chosen)
        is_pair = ranks < counts  # [T, K]
        padded, spread = np.zeros(shape, np.int64), np.zeros(shape, self.dtype)
        spread[is_pair] = weights
        if len(ids):
            # Beyond its experts a row repeats the last.
            places = counts.cumsum()[:, None] - counts + np.minimum(ranks, counts - 1)
            padded = np.where(counts > 0, ids[np.minimum(places, len(ids) - 1)], 0)
        return Choice(padded, torch.from_numpy(spread), np.flatnonzero(is_pair))


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _pooled(array: np.ndarray, pool: str, dtype: np.dtype, where: str) -> np.ndarray:
    """Return the vectors that a gate looks at, as contiguous [T, F]."""
    if pool == "flatten":
        return np.ascontiguousarray(_flat(array), dtype)
    if not array.shape[1]:
        raise InvalidRequestError("a sequence must have at least one step (given: 0)", where)
    if pool == "last":
        return np.ascontiguousarray(array[:, -1], dtype)
    steps = np.array(array.transpose(1, 0, 2), dtype, order="C")  # [steps, T, F]
    return sum_first(steps) / dtype.type(array.shape[1])
