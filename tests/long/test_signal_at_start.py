"""A signal to ``serve run`` while it starts Ray, and before it has connected to it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.signal_at_start import RAYLET, STARTED, check_signal_at_start


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, RAYLET), (signal.SIGINT, STARTED), (signal.SIGTERM, STARTED)],
)
def test_a_signal_while_ray_starts_leaves_nothing(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    check_signal_at_start(tmp_path, number, moment)
