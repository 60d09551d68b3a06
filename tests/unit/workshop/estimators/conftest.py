"""One thread for the estimators' fits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads of BLAS wait for each other longer than such small fits take."""
    with threadpool_limits(1):
        yield
