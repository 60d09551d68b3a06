"""Checkpoints that other nodes have."""
