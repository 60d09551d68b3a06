"""scikit-learn's own checks of all public estimators with their defaults, and of recurrent ones."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_fit_idempotent, estimator_checks_generator

from tests.unit.workshop.estimators.test_adaptive_checks import FAST, RECURRENT
from workshop.estimators import estimators
from workshop.estimators.adaptive import base as adaptive
from workshop.estimators.general import ensemble
from workshop.estimators.hierarchical import base as hierarchical

BY_ENVIRONMENT = "check_array_api_input"
"""It checks arrays of other libraries, and only where SCIPY_ARRAY_API is set."""
CHECKED: list[Any] = [
    *(getattr(estimators, name)() for name in estimators.__all__),
    estimators.AdaptiveMixtureRegressor(**FAST, **RECURRENT),
    estimators.AdaptiveMixtureClassifier(**FAST, **RECURRENT),
]


RESULTS: dict[bytes, bytes] = {}
"""The results of fits from one start, by all that they depend on."""


class _Keys(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Write what a pickle of a tensor or an array does not tell."""
        if isinstance(value, torch.Tensor):  # its own pickle has an address
            return np.array, (value.numpy(),)
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            return np.frombuffer, (value.copy(),)  # a fit that writes to it fails
        return NotImplemented


@pytest.fixture(autouse=True)
def _one_fit_of_equal_data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute fits of equal data once, as many checks share theirs.

    This hides only fits that differ on equal data. For those ``check_fit_idempotent`` is there,
    whose fits are all computed.
    """

    def remembered(fit: Callable[..., Any]) -> Callable[..., Any]:
        def result(*args: Any, **progress: Any) -> Any:
            keys = io.BytesIO()
            _Keys(keys).dump((fit.__name__, [value for value in args if not callable(value)]))
            key = keys.getvalue()
            if key not in RESULTS:
                RESULTS[key] = pickle.dumps(fit(*args, **progress))
            return pickle.loads(RESULTS[key])

        return result

    if request.node.callspec.params["check"].func is check_fit_idempotent:
        return
    for module, name in ((adaptive, "fit_network"), (hierarchical, "fit_from"), (ensemble, "fits")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))


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
