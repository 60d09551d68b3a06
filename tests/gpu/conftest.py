"""The tests of this folder need an accelerator; without one nothing is collected."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """End pytest with one line where torch finds no accelerator."""
    if not torch.accelerator.is_available():
        raise pytest.UsageError(
            f"tests/gpu needs an accelerator, and torch {torch.__version__} finds none here"
        )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The accelerator."""
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found
