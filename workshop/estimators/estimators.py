"""All estimators of mixtures, to import from one place."""

from workshop.estimators.adaptive.estimators import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
)
from workshop.estimators.general.estimators import (
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)
from workshop.estimators.hierarchical.estimators import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
)

__all__ = [
    "AdaptiveMixtureClassifier",
    "AdaptiveMixtureRegressor",
    "HierarchicalMixtureClassifier",
    "HierarchicalMixtureRegressor",
    "MixtureOfExpertsClassifier",
    "MixtureOfExpertsRegressor",
]
