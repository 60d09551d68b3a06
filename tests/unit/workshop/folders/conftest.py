"""A short text for the commands, and blocks small enough to hold a part of it out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.workshop.folders.edits import write_letters
from workshop import texts


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "BLOCK_CHARS", 1024)
        yield


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose tokens go to all experts of a random model."""
    return write_letters(tmp_path_factory.mktemp("text") / "letters.txt", 5_400)
