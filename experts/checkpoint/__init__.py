"""Checkpoints: files, headers, tensors, identity, and readers on other nodes."""
