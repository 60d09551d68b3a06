"""Mixtures: the gate's choice, the combination of the experts' outputs, and their engine."""
