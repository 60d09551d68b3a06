"""scikit-learn's own checks of an estimator, as pytest's parameters."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator

BY_ENVIRONMENT = "check_array_api_input"
"""It checks arrays of other libraries, and only where SCIPY_ARRAY_API is set."""


def contract_of(*estimators: Any) -> pytest.MarkDecorator:
    """Return the parameters ``estimator`` and ``check`` of a test that calls each check."""
    checks = [
        pytest.param(fresh, check, id=f"{type(estimator).__name__}-{check.func.__name__}")
        for estimator in estimators
        for fresh, check in estimator_checks_generator(estimator)
        if check.func.__name__ != BY_ENVIRONMENT
    ]
    return pytest.mark.parametrize(("estimator", "check"), checks)
