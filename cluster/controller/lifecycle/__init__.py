"""Actors from their start to their end, and the lease of the controller."""
