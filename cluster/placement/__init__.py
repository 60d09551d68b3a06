"""Decisions about placement: pure functions without Ray, clock or I/O."""
