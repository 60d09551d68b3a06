"""First divisions of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from workshop.estimators.general.divisions import divisions_of
from workshop.estimators.general.fits import Data


def divisions(X: np.ndarray, y: np.ndarray, count: int, weights: np.ndarray | None = None) -> list:
    data = Data(X, y[:, None], np.ones(len(X)) if weights is None else weights, None)
    return divisions_of(data, count, 4, np.random.RandomState(0))


def test_planes_find_the_border_that_k_means_does_not() -> None:
    source = np.random.default_rng(0)
    X = source.uniform(-1, 1, (300, 4))
    X[:, 2] += source.choice([-4, 4], 300)  # two clusters that do not matter
    y = np.where(X[:, 0] < 0, X[:, 1] + X[:, 3], X[:, 3] - 2 * X[:, 1])
    by_means, *others = divisions(X, y, 2)
    is_right = X[:, 0] > 0

    def agreement(shares: np.ndarray) -> float:
        share = (shares.argmax(axis=1) == is_right).mean()
        return max(share, 1 - share)

    assert max(map(agreement, others[::2])) > 0.9
    assert agreement(by_means) < 0.8


@pytest.mark.parametrize("count", [1, 3])
def test_a_division_gives_each_row_to_one_expert(count: int) -> None:
    source = np.random.default_rng(count)
    for num_rows, num_features in ((5, 2), (40, 60), (2100, 2)):
        X, y = source.normal(size=(num_rows, num_features)), source.normal(size=num_rows)
        for shares in divisions(X, y, count):
            assert shares.shape == (num_rows, count)
            assert set(np.unique(shares)) <= {0.0, 1.0}
            np.testing.assert_array_equal(shares.sum(axis=1), 1)


def test_a_weight_is_worth_as_many_rows() -> None:
    source = np.random.default_rng(3)
    X, y = source.normal(size=(60, 2)), source.normal(size=60)
    weights = source.integers(1, 4, 60)
    again = np.repeat(np.arange(60), weights)
    weighted = divisions(X, y, 3, weights.astype(float))
    for shares, repeated in zip(weighted, divisions(X[again], y[again], 3), strict=True):
        np.testing.assert_array_equal(shares[again], repeated)
