"""A router where transformers was imported before it."""

from __future__ import annotations

import subprocess
import sys


def test_a_process_that_has_imported_transformers_already_goes_on() -> None:
    program = "import transformers, router.model.model as m; print(m.transformers.__name__)"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    assert run.stdout.strip() == "transformers"
