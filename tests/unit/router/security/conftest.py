"""Tests here may be coroutines."""

from tests.unit.coroutines import pytest_pyfunc_call, runner

__all__ = ["pytest_pyfunc_call", "runner"]
