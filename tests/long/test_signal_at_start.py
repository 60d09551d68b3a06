"""A signal to ``expertmesh serve`` while it starts Ray, and before it has connected to it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.signal_at_start import RAYLET, STARTED, check_signal_at_start


@pytest.mark.parametrize("moment", [RAYLET, STARTED])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_leaves_nothing(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    check_signal_at_start(tmp_path, number, moment)
