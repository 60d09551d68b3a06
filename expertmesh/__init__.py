"""What people import: clients with their requests, replies and errors, and the estimators.

A name is imported when it is first used, so ``import expertmesh`` alone loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.errors import *  # noqa: F403
    from router.client import *  # noqa: F403
    from workshop.estimators.estimators import *  # noqa: F403

_NAMES = {
    "router.client": "AsyncClient Client ClientTls Message MixtureInfo ModelInfo Prediction "
    "PromptLogprobs Reply RequestOptions Sampling TensorInfo Token UnreachableError Usage",
    "cluster.errors": "CancelledRequestError CheckpointError ConfigError DeadlineExceededError "
    "ExpertMeshError ExpertUnavailableError ForbiddenError InternalError InvalidRequestError "
    "ModelReplacedError OverloadedError PoisonedRequestError SlowReaderError TooLargeError "
    "UnauthenticatedError UnavailableError UnknownModelError UnsupportedError",
    "workshop.estimators.estimators": "AdaptiveMixtureClassifier AdaptiveMixtureRegressor "
    "HierarchicalMixtureClassifier HierarchicalMixtureRegressor MixtureOfExpertsClassifier "
    "MixtureOfExpertsRegressor",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'expertmesh' has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(_MODULES[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
