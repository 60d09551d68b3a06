"""scikit-learn's own checks of all public estimators with their defaults, and of recurrent ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator
from threadpoolctl import threadpool_limits

from router.workshop.mixture import estimators
from tests.unit.router.workshop.mixture.test_adaptive_checks import FAST, RECURRENT

BY_ENVIRONMENT = "check_array_api_input"
"""It checks arrays of other libraries, and only where SCIPY_ARRAY_API is set."""
CHECKED: list[Any] = [
    *(getattr(estimators, name)() for name in estimators.__all__),
    estimators.AdaptiveMixtureRegressor(**FAST, **RECURRENT),
    estimators.AdaptiveMixtureClassifier(**FAST, **RECURRENT),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads of BLAS wait for each other longer than such small fits take."""
    with threadpool_limits(1):
        yield


@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        pytest.param(fresh, check, id=f"{type(estimator).__name__}-{check.func.__name__}")
        for estimator in CHECKED
        for fresh, check in estimator_checks_generator(estimator)
        if check.func.__name__ != BY_ENVIRONMENT
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_contract_of_scikit_learn_is_kept(estimator: Any, check: Any) -> None:
    check(estimator)
