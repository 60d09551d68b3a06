"""Experts: checkpoints, model families, computation, batching, and the expert actor."""
