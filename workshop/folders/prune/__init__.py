"""Leaving out the experts that matter least."""
