"""EM for a tree of two levels of linear gates over linear regressions with normal noise.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm", with Newton's
method for the gates, from several starts.

Dimension letters: T rows, F features and a 1, B branches of the root, L leaves of a branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.bundled.trained import Begin

NUM_BRANCHES, NUM_LEAVES = 4, 4
NUM_STARTS, SHORT_ITERATIONS = 12, 25
NUM_KEPT, LONG_ITERATIONS = 3, 60
NEWTON_STEPS, LONGEST_STEP = 2, 3.0
GATE_RIDGE, EXPERT_RIDGE = 1e-3, 1e-2
LEAST_DEVIATION = 0.05
OTHERS_SHARE = 0.01
"""The share of a row that each leaf has at the start, where it is not the row's own."""


@dataclass(slots=True)
class Tree:
    """``root`` [B, F] and ``branches`` [B, L, F] are gates, ``slopes`` [B, L, F] the experts.

    The last of the F numbers belongs to the 1 that follows a row's features. ``deviations`` [B, L]
    are of the experts' normal densities.
    """

    root: np.ndarray
    branches: np.ndarray
    slopes: np.ndarray
    deviations: np.ndarray

    def log_joint(self, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return each leaf's log weight plus its log density at ``y`` [T]: [T, B, L]."""
        weights = _log_softmax(rows @ self.root.T)[:, :, None] + _log_softmax(
            np.einsum("tf,blf->tbl", rows, self.branches)
        )
        errors = (y[:, None, None] - self.means(rows)) / self.deviations
        joint: np.ndarray = weights - 0.5 * errors**2 - np.log(self.deviations)
        return joint - 0.5 * np.log(2 * np.pi)

    def means(self, rows: np.ndarray) -> np.ndarray:
        """Return the experts' means [T, B, L]."""
        return np.einsum("tf,blf->tbl", rows, self.slopes)


def fit(x: np.ndarray, y: np.ndarray, begin: Begin) -> Tree:
    """Return the likeliest tree of several starts."""
    rows = np.hstack([x, np.ones((len(x), 1))])
    found = []
    for seed in range(NUM_STARTS):
        begin(f"start {seed + 1} of {NUM_STARTS}")
        found.append(_iterated(_started(rows, y, seed), rows, y, SHORT_ITERATIONS))
    found.sort(key=lambda pair: -pair[1])
    longer = []
    for tree, _ in found[:NUM_KEPT]:
        begin("the best starts, longer")
        longer.append(_iterated(tree, rows, y, LONG_ITERATIONS))
    return max(longer, key=lambda pair: pair[1])[0]


def _started(rows: np.ndarray, y: np.ndarray, seed: int) -> Tree:
    """Return a tree whose leaves have the rows nearest to random rows, level after level."""
    rng = np.random.default_rng(seed)
    shares = np.full((len(rows), NUM_BRANCHES, NUM_LEAVES), OTHERS_SHARE)
    branch = _nearest(rows, rng.choice(len(rows), NUM_BRANCHES, replace=False))
    for number in range(NUM_BRANCHES):
        members = np.flatnonzero(branch == number)
        chosen = rng.choice(len(members), NUM_LEAVES, replace=False)
        shares[members, number, _nearest(rows[members], chosen)] = 1.0
    shares /= shares.sum(axis=(1, 2), keepdims=True)
    shape = (NUM_BRANCHES, NUM_LEAVES, rows.shape[1])
    tree = Tree(np.zeros(shape[::2]), np.zeros(shape), np.zeros(shape), np.ones(shape[:2]))
    _maximize(tree, rows, y, shares)
    return tree


def _nearest(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the place of the nearest of the chosen rows for each row [T]."""
    squares = ((rows[:, None] - rows[chosen]) ** 2).sum(axis=2)
    return squares.argmin(axis=1)


def _iterated(tree: Tree, rows: np.ndarray, y: np.ndarray, count: int) -> tuple[Tree, float]:
    """Run EM; returns the tree and the mean log density of the rows before the last step."""
    density = -np.inf
    for _ in range(count):
        joint = tree.log_joint(rows, y)
        largest = joint.max(axis=(1, 2), keepdims=True)
        powers = np.exp(joint - largest)
        totals = powers.sum(axis=(1, 2), keepdims=True)
        density = float((largest + np.log(totals)).mean())
        _maximize(tree, rows, y, powers / totals)
    return tree, density


def _maximize(tree: Tree, rows: np.ndarray, y: np.ndarray, shares: np.ndarray) -> None:
    """Fit gates and experts to the leaves' shares of the rows [T, B, L] (the M step)."""
    of_branch = shares.sum(axis=2)  # [T, B]
    tree.root = _newton(tree.root, rows, of_branch, np.ones(len(rows)))
    for b in range(NUM_BRANCHES):
        targets = shares[:, b] / np.maximum(of_branch[:, b], 1e-12)[:, None]
        tree.branches[b] = _newton(tree.branches[b], rows, targets, of_branch[:, b])
        for leaf in range(NUM_LEAVES):
            weighted = rows * shares[:, b, leaf][:, None]
            squares = weighted.T @ rows + EXPERT_RIDGE * np.eye(rows.shape[1])
            tree.slopes[b, leaf] = np.linalg.solve(squares, weighted.T @ y)
            errors = y - rows @ tree.slopes[b, leaf]
            total = max(shares[:, b, leaf].sum(), 1e-9)
            deviation = np.sqrt((shares[:, b, leaf] * errors**2).sum() / total)
            tree.deviations[b, leaf] = max(LEAST_DEVIATION, deviation)


def _newton(
    weight: np.ndarray, rows: np.ndarray, targets: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return a gate [choices, F], fitted to shares ``targets`` [T, choices] of weighed rows."""
    num_choices, size = weight.shape
    for _ in range(NEWTON_STEPS):
        shares = np.exp(_log_softmax(rows @ weight.T))
        slope = ((shares - targets) * counts[:, None]).T @ rows + GATE_RIDGE * weight
        curve = np.empty((num_choices, size, num_choices, size))
        for a in range(num_choices):
            for b in range(num_choices):
                bend = counts * shares[:, a] * ((a == b) - shares[:, b])
                curve[a, :, b] = (rows * bend[:, None]).T @ rows
        flat = curve.reshape(weight.size, weight.size) + GATE_RIDGE * np.eye(weight.size)
        step = np.linalg.solve(flat, slope.ravel()).reshape(weight.shape)
        weight = weight - step * min(1.0, LONGEST_STEP / np.abs(step).max())
    return weight


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
