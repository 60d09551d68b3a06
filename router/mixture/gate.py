"""The gates of a mixture: a tree of them chooses each row's experts, with weights.

The root gives a row to its best choices, gates or experts, and each of these gates does the same. A
choice's weight is the softmax of its score, and an expert's weight is the product of the weights
along its path (Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm",
section 2). A gate is computed for the rows that reach it, and for no other row.

A row's choice and weights are the same bits alone and in any batch
(:mod:`experts.compute.row_math`), and the same in any process of one kind of machine.

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
from experts.compute.row_math import sum_first
from experts.mixture.parts import GivenGate
from experts.mixture.spec import most_experts
from router.mixture.scores import Scores, read_scores
from router.moe.gate import Choice, ChooseAmong

_Chosen = tuple[np.ndarray, np.ndarray]
"""The choices of a gate: bool [C, R], and their weights [C, R], which count where chosen."""


class MixtureGate:
    """Chooses the experts of rows. Immutable, so that any thread may use it.

    ``num_experts`` is E, ``max_chosen`` is K.
    """

    def __init__(self, mixture: Mixture) -> None:
        """Read the gates' files.

        Raises :class:`CheckpointError`, whose field is the file and the tensor, for a tensor that
        is missing, of a wrong shape or dtype, or not finite.
        """
        spec = mixture.spec
        self.num_experts = len(spec.experts)
        self.max_chosen = most_experts(spec)
        self._dtype = np.dtype(spec.dtype)
        ids = {name: expert_id for expert_id, name in enumerate(spec.experts)}
        scores = read_scores(mixture)

        def node(name: str) -> _Node:
            gate = spec.gates[name]
            experts = np.array([ids.get(choice, -1) for choice in gate.choices], np.int64)
            gates = {c: node(choice) for c, choice in enumerate(gate.choices) if choice not in ids}
            if isinstance(gate, GivenGate):
                return _GivenNode(name, experts, gates, gate.input, gate.column)
            return _ScoringNode(
                name, experts, gates, scores[name], gate.num_chosen, gate.renormalize
            )

        self._root = node(spec.gate)

    def choose(self, inputs: Mapping[str, np.ndarray], allowed: np.ndarray | None = None) -> Choice:
        """Return the experts of T rows, ascending by number in each row, with their weights.

        ``inputs`` are arrays [T, *shape] by name, of the inputs' datatypes. Weights have the
        mixture's dtype. Where a row has fewer than K experts, its last one fills the row with a
        weight of 0; such pairs are not in ``pairs``. Of equal scores the choice that is listed
        first wins.

        With ``allowed``, bool [T, E], choices are out that lead a row to no allowed expert, and
        weights are normalised over the others. A row without any allowed expert has no pairs.

        Raises :class:`InvalidRequestError` for a given choice that does not exist, and
        :class:`NotFiniteError` for scores that are NaN or infinite. Either names the first such
        row; the caller finds further ones by choosing for fewer rows.
        """
        num_rows = len(next(iter(inputs.values())))
        walk = _Walk(inputs, self._dtype, allowed)
        rows = np.arange(num_rows)
        with np.errstate(all="ignore"):
            walk.descend(self._root, rows, None)
        return walk.choice(num_rows, self.max_chosen)

    def among(self, inputs: Mapping[str, np.ndarray]) -> ChooseAmong:
        """Return :meth:`choose` for the rows of one step, to choose anew for some of them."""

        def choose_among(rows: np.ndarray, allowed: np.ndarray) -> Choice:
            return self.choose({name: array[rows] for name, array in inputs.items()}, allowed)

        return choose_among


@dataclass(frozen=True, slots=True)
class _Node:
    """One gate: ``experts`` [C] are its choices' numbers, -1 for those of ``gates`` by place."""

    name: str
    experts: np.ndarray
    gates: Mapping[int, _Node]

    def choose(self, walk: _Walk, rows: np.ndarray, open_: np.ndarray | None) -> _Chosen:
        """Choose for the rows [R] among the ``open_`` choices, bool [C, R]; ``None`` is all."""
        raise NotImplementedError

    def reached(self, walk: _Walk, rows: np.ndarray) -> np.ndarray:
        """Return whether the rows [R] can come to an allowed expert below, by choice: [C, R]."""
        assert walk.allowed is not None
        result = np.empty((len(self.experts), len(rows)), dtype=bool)
        for place, expert_id in enumerate(self.experts.tolist()):
            if expert_id < 0:
                result[place] = self.gates[place].reached(walk, rows).any(axis=0)
            else:
                result[place] = walk.allowed[rows, expert_id]
        return result


@dataclass(frozen=True, slots=True)
class _ScoringNode(_Node):
    scores: Scores
    num_chosen: int
    renormalize: bool

    def choose(self, walk: _Walk, rows: np.ndarray, open_: np.ndarray | None) -> _Chosen:
        scores = self.scores(walk.columns(self.scores.input, self.scores.pool, rows))  # [C, R]
        finite = np.isfinite(scores)
        if not finite.all():
            row = rows[np.flatnonzero(~finite.all(axis=0))[0]]
            raise NotFiniteError(f"scores of row {row} are NaN or infinite", f"gates.{self.name}")
        if open_ is not None:
            scores = np.where(open_, scores, -np.inf)
        chosen = self._best(scores)
        if open_ is not None:
            chosen &= open_
        # A row without an open choice has nothing but -inf.
        shares = np.exp(scores - np.maximum(scores.max(axis=0), np.finfo(scores.dtype).min))
        counted = np.where(chosen, shares, 0) if self.renormalize else shares.copy()
        total = sum_first(counted)
        return chosen, shares / np.where(total > 0, total, 1).astype(shares.dtype)

    def _best(self, scores: np.ndarray) -> np.ndarray:
        """Return the best choices, bool [C, R]; the first of equal ones."""
        if self.num_chosen == len(scores):
            return np.ones(scores.shape, dtype=bool)
        chosen = np.zeros(scores.shape, dtype=bool)
        if self.num_chosen == 1:
            chosen[scores.argmax(axis=0), np.arange(scores.shape[1])] = True
            return chosen
        order = np.argsort(-scores.T, axis=1, kind="stable")[:, : self.num_chosen]
        np.put_along_axis(chosen.T, order, True, axis=1)
        return chosen


@dataclass(frozen=True, slots=True)
class _GivenNode(_Node):
    input: str
    column: int

    def choose(self, walk: _Walk, rows: np.ndarray, open_: np.ndarray | None) -> _Chosen:
        given = self._given(walk, rows)
        num_choices = len(self.experts)
        wrong = np.flatnonzero((given < 0) | (given >= num_choices))
        if len(wrong):
            raise InvalidRequestError(
                f"gate {self.name!r} has no choice {given[wrong[0]]} for row {rows[wrong[0]]}, "
                f"column {self.column}; allowed: 0 to {num_choices - 1}",
                f"inputs.{self.input}",
            )
        chosen = np.arange(num_choices)[:, None] == given
        if open_ is not None:
            chosen &= open_
        return chosen, np.ones(chosen.shape, walk.dtype)

    def reached(self, walk: _Walk, rows: np.ndarray) -> np.ndarray:
        """Return the given choice alone; none where the gate, not reached so far, has none."""
        below = _Node.reached(self, walk, rows)
        below &= np.arange(len(self.experts))[:, None] == self._given(walk, rows)
        return below

    def _given(self, walk: _Walk, rows: np.ndarray) -> np.ndarray:
        array = walk.inputs[self.input]
        given: np.ndarray = array.reshape(len(array), math.prod(array.shape[1:]))[rows, self.column]
        return given


class _Walk:
    """One choice: the rows on their way down the tree, and the experts that they have reached."""

    def __init__(
        self, inputs: Mapping[str, np.ndarray], dtype: np.dtype, allowed: np.ndarray | None
    ) -> None:
        self.inputs = inputs
        self.dtype = dtype
        self.allowed = allowed
        self._columns: dict[tuple[str, str], np.ndarray] = {}
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rows, ids, weights

    def columns(self, name: str, pool: str, rows: np.ndarray) -> np.ndarray:
        """Return an input's values [F, R] of the rows, in the mixture's dtype."""
        columns = self._columns.get((name, pool))
        if columns is None:
            columns = self._columns[name, pool] = _pooled(
                self.inputs[name], pool, self.dtype, f"inputs.{name}"
            )
        return columns if len(rows) == columns.shape[1] else columns[:, rows]

    def descend(self, node: _Node, rows: np.ndarray, weights: np.ndarray | None) -> None:
        """Lead ``rows`` [R] through a gate and those below; ``weights`` [R] are of their paths."""
        open_ = None if self.allowed is None else node.reached(self, rows)
        chosen, shares = node.choose(self, rows, open_)
        if weights is not None:
            shares = shares * weights
        is_expert = node.experts >= 0
        if is_expert.any():
            at_expert = chosen & is_expert[:, None] if node.gates else chosen
            members, places = at_expert.T.nonzero()
            self._found.append((rows[members], node.experts[places], shares[places, members]))
        for place, below in node.gates.items():
            members = chosen[place].nonzero()[0]
            if len(members):
                self.descend(below, rows[members], shares[place, members])

    def choice(self, num_rows: int, max_chosen: int) -> Choice:
        """Return what was found, by row and by expert."""
        rows, ids, weights = (np.concatenate(part) for part in zip(*self._found, strict=True))
        before = rows[:-1], ids[:-1]
        is_sorted = (rows[1:] > before[0]) | ((rows[1:] == before[0]) & (ids[1:] > before[1]))
        if not is_sorted.all():
            order = np.lexsort((ids, rows))
            rows, ids, weights = rows[order], ids[order], weights[order]
        shape = (num_rows, max_chosen)
        if len(ids) == num_rows * max_chosen:
            return Choice(ids.reshape(shape), torch.from_numpy(weights.reshape(shape)))
        counts = np.bincount(rows, minlength=num_rows)[:, None]  # [T, 1]
        ranks = np.arange(max_chosen)
        is_pair = ranks < counts  # [T, K]
        # Beyond its experts a row repeats the last.
        source = np.cumsum(counts)[:, None] - counts + np.minimum(ranks, counts - 1)
        has_any = counts > 0
        padded = np.where(has_any, ids[np.where(has_any, source, 0)] if len(ids) else 0, 0)
        spread = np.zeros(shape, self.dtype)
        spread[is_pair] = weights
        return Choice(padded, torch.from_numpy(spread), np.flatnonzero(is_pair))


def _pooled(array: np.ndarray, pool: str, dtype: np.dtype, where: str) -> np.ndarray:
    """Return the vectors that a gate looks at, as contiguous [F, T]."""
    if pool == "flatten":
        return np.ascontiguousarray(array.reshape(len(array), math.prod(array.shape[1:])).T, dtype)
    if not array.shape[1]:
        raise InvalidRequestError("a sequence must have at least one step (given: 0)", where)
    if pool == "last":
        return np.ascontiguousarray(array[:, -1].T, dtype)
    steps = np.array(array.transpose(1, 2, 0), dtype, order="C")  # [steps, F, T]
    return sum_first(steps) / dtype.type(array.shape[1])
