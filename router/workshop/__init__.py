"""Whole-model work on Mixture-of-Experts checkpoints, done offline and apart from serving."""
