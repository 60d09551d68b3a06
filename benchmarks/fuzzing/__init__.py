"""Hostile input: what is mutated, how, and what must hold whatever comes; see benchmarks.fuzz."""
