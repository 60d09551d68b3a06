"""Sums in a fixed order: their error, and their bits whatever lies beside them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.mixture.sums import sum_first


@settings(max_examples=100)
@given(
    count=st.integers(1, 200),
    width=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sum_has_the_same_bits_whatever_lies_beside_it(
    count: int, width: int, dtype: str, seed: int
) -> None:
    values = np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)
    sums = sum_first(values.copy())
    for column in range(width):
        assert sum_first(values[:, column : column + 1].copy())[0] == sums[column]
        assert sum_first(values[:, column].copy()) == sums[column]
    exact = np.array([math.fsum(column) for column in values.T.astype(float).tolist()])
    size = np.abs(values.astype(float)).sum(axis=0)
    # A pairwise sum's error bound (Higham 1993).
    bound = math.ceil(math.log2(max(count, 2))) * np.finfo(dtype).eps * size
    assert (np.abs(sums - exact) <= bound).all()
