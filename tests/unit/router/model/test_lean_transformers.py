"""What a router imports of transformers: no library that it never calls, whatever came before."""

from __future__ import annotations

import subprocess
import sys

from router.model.lean_transformers import UNUSED


def output_of(program: str) -> str:
    """Return what a process of its own prints."""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    return run.stdout.strip()


def test_a_router_has_none_of_them_and_may_import_them_later() -> None:
    program = (
        "import sys, router.engine.replica, transformers.models.mixtral.modeling_mixtral; "
        f"print([name for name in {UNUSED} if name in sys.modules]); "
        "import scipy.optimize, PIL.Image"
    )
    assert output_of(program) == "[]"
