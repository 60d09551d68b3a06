"""What unit tests share: a little text, and one thread for what must give the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.router.workshop.training_runs import write_grammar


@pytest.fixture(scope="session")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that a tiny model learns in a few steps."""
    return write_grammar(tmp_path_factory.mktemp("text") / "grammar.txt")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread, on which training is a function of its seed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
