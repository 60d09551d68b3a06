"""Faster replacements of torch's operations on a CPU."""
