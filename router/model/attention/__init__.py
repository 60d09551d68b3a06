"""Attention of packed tokens to a paged cache, and its implementations."""
