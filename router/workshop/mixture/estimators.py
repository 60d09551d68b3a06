"""All estimators of mixtures, to import from one place."""

from router.workshop.mixture.adaptive.estimators import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
)
from router.workshop.mixture.general.estimators import (
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)
from router.workshop.mixture.hierarchical.estimators import (
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
