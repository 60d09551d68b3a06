"""Data of planted pieces, for the tests of mixtures."""

from __future__ import annotations

import numpy as np

NOISE = 0.02

Data = tuple[np.ndarray, np.ndarray]


def absolute(num_rows: int = 300, seed: int = 0) -> Data:
    """Return rows [N, 1] and |x| with noise: two lines that meet at 0."""
    source = np.random.RandomState(seed)
    x = source.uniform(-1, 1, (num_rows, 1))
    return x, np.abs(x[:, 0]) + NOISE * source.randn(num_rows)


def jump(num_rows: int = 300, seed: int = 0) -> Data:
    """Return rows [N, 1] and x left of 0, 1 - x right of it, with noise."""
    source = np.random.RandomState(seed)
    x = source.uniform(-1, 1, (num_rows, 1))
    values = np.where(x[:, 0] < 0, x[:, 0], 1 - x[:, 0])
    return x, values + NOISE * source.randn(num_rows)


def quadrants(num_rows: int = 600, seed: int = 0) -> Data:
    """Return rows [N, 2] and a plane of its own over each quadrant, with noise."""
    source = np.random.RandomState(seed)
    x = source.uniform(-1, 1, (num_rows, 2))
    planes = np.random.RandomState(100).uniform(-2, 2, (4, 3))[quadrant(x)]
    values = planes[:, 0] + (planes[:, 1:] * x).sum(axis=1)
    return x, values + 0.05 * values.std() * source.randn(num_rows)


def quadrant(x: np.ndarray) -> np.ndarray:
    """Return the number [N] of each row's quadrant."""
    return 2 * (x[:, 0] > 0) + (x[:, 1] > 0)


def sequences(num_rows: int = 200, num_steps: int = 6, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return sequences [N, T, 2], targets [N] and the piece [N] that made each target.

    The mean of the first values says which of two functions of the last steps the target is.
    """
    source = np.random.RandomState(seed)
    x = source.randn(num_rows, num_steps, 2)
    piece = source.randint(2, size=num_rows)
    x[:, :, 0] += np.where(piece, 2.0, -2.0)[:, None]
    sums, last = x[:, -1, 1] + x[:, -2, 1], -2 * x[:, -1, 1]
    return x, np.where(piece, sums, last) + 0.05 * source.randn(num_rows), piece


def two_pieces(seed: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [N, 2] and a target with one slope below 0 and another above, and noise."""
    source = np.random.default_rng(seed)
    X = source.uniform(-2, 2, size=(count, 2))
    y = np.where(X[:, 0] < 0, 3 * X[:, 0] + 1, -2 * X[:, 0] + X[:, 1])
    return X, y + 0.05 * source.normal(size=count)


def two_rules(seed: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [N, 2] and labels whose rule turns over at 0, as an exclusive or."""
    X = np.random.default_rng(seed).uniform(-2, 2, size=(count, 2))
    return X, np.where((X[:, 0] > 0) == (X[:, 1] > 0), "same", "other")
