"""Mixtures of any scikit-learn estimators, with a gate of the choice of their user."""
