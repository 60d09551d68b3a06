"""What tests of expert actors share: a Mixtral checkpoint, an emulated device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import save_mixtral
from tests.emulated_device import EmulatedDevice, emulated_device
from tests.unit.experts.local_actor import self_tests_ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Mixtral checkpoint of float32."""
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path)
    return path


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    """An emulated accelerator, where torch looks for one."""
    with emulated_device() as device, self_tests_ended():
        yield device
