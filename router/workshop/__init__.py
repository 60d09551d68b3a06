"""Trains and evaluates whole Mixture-of-Experts models, offline and apart from serving."""
