"""What the tests of this folder share: an emulated device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.emulated_device import EmulatedDevice, emulated_device


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated_device() as device:
        yield device
