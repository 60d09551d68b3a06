"""What the tests of this folder share: a small checkpoint and an emulated device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import save_mixtral
from tests.emulated_device import EmulatedDevice, emulated_device


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder)
    return folder


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated_device() as device:
        yield device
