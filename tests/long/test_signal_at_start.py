"""Ctrl-C of ``serve run`` when it has started Ray, and has not connected to it yet."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.signal_at_start import STARTED, check_signal_at_start


def test_ctrl_c_when_ray_has_started_leaves_nothing(tmp_path: Path) -> None:
    check_signal_at_start(tmp_path, signal.SIGINT, STARTED)
