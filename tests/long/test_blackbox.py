"""Five minutes of the black-box checker: faults and changes on three machines break no promise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.environment import without_ray
from tests.readme import ROOT

MINUTES, SEED = 5, 20
FEWEST_EVENTS, FEWEST_REQUESTS = 8, 300
LIMIT_S = 780.0
"""A start, the last event and its calm come on top of the minutes."""


@pytest.mark.timeout(LIMIT_S + 20)
def test_nobody_outside_sees_a_broken_promise(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    options = ["--minutes", str(MINUTES), "--seed", str(SEED), "--history", str(history)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.blackbox", *options],
        cwd=ROOT,
        env=without_ray(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    counts = Counter(line["what"] for line in lines)
    assert counts["violation"] == 0
    assert counts["event"] >= FEWEST_EVENTS
    assert counts["request"] >= FEWEST_REQUESTS
    assert counts["calm"] == 1 + counts["episode"]
