"""Checkpoints: files, headers, tensors, identity, and checkpoints on other nodes."""
