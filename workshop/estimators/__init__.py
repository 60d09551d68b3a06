"""Mixtures of experts as scikit-learn estimators, saved in the format that is served."""
