"""What tests of checkpoints share: a checkpoint to spoil, and what is hashed of any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experts.checkpoint import identity
from tests.checkpoints import copy_of


@pytest.fixture
def folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return copy_of(folder, tmp_path / "model")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were hashed, in order."""
    folders = []
    hash_tensors = identity.hash_tensors

    def recorded(opened: Any, watch: Any = None) -> dict[str, bytes]:
        folders.append(opened.folder)
        return hash_tensors(opened, watch)

    monkeypatch.setattr(identity, "hash_tensors", recorded)
    return folders
