"""Judges the faults of one file, in a copy of the repository that this process may change.

    python -m tests.mutation.judge FILE SEED MAX_MUTANTS TEST_FILE ...

Prints one JSON object a line: first the number of mutants, then the :class:`Verdict` on each.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.mutation.operators import Mutant, drawn

IMPORTED = Path("imported-modules")
"""What the tests import from elsewhere, which the processes of mutants then inherit."""
FIRST_LIMIT_S = 300.0
"""How long the tests of the code without a fault may take."""
ALLOWANCE, ALLOWANCE_S = 5.0, 10.0
"""A mutant's time limit: this factor of the time without a fault, and this much more."""
OPTIONS = ("-q", "-x", "-n0", "-pno:cacheprovider", "--hypothesis-seed=0")


@dataclass(frozen=True)
class Verdict:
    """What the tests said of a mutant; one without an end in its time is also a fault found."""

    line: int
    change: str
    outcome: Literal["killed", "timed out", "survived"]
    took_s: float


def judge(name: str, seed: int, most: int, tests: Sequence[str]) -> None:
    """Print the verdicts on a file's mutants.

    Raises ``RuntimeError`` where the tests fail without a fault.
    """
    file = Path(name)
    code = file.read_text(encoding="utf-8")
    whole = Mutant(0, "", ast.unparse(ast.parse(code)))
    for _ in range(2):  # the second one inherits what the first imports, as the mutants do
        verdict = _verdict(file, whole, tests, FIRST_LIMIT_S)
        if verdict.outcome != "survived":
            raise RuntimeError(f"{name}: its tests fail without a fault ({verdict.outcome})")
        _import_all(IMPORTED.read_text(encoding="utf-8").split())
    limit_s = ALLOWANCE * verdict.took_s + ALLOWANCE_S
    mutants = drawn(code, name, seed, most)
    print(len(mutants), flush=True)
    for mutant in mutants:
        print(json.dumps(asdict(_verdict(file, mutant, tests, limit_s))), flush=True)


def _verdict(file: Path, mutant: Mutant, tests: Sequence[str], limit_s: float) -> Verdict:
    """Run the tests on a mutant, in a process group of its own, which ends here."""
    file.write_text(mutant.code, encoding="utf-8")
    # Its time stamp may be that of the mutant before.
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    begun_at_s = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_test, args=(tests,))
    process.start()
    try:
        process.join(limit_s)
        is_late = process.is_alive()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    took_s = time.monotonic() - begun_at_s
    outcome = "timed out" if is_late else "killed" if process.exitcode else "survived"
    return Verdict(mutant.line, mutant.change, outcome, round(took_s, 1))


def _test(tests: Sequence[str]) -> None:
    """End with pytest's status; its output goes nowhere."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    status = pytest.main([*OPTIONS, *tests])
    here = str(Path.cwd())
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    elsewhere = [name for name, file in files.items() if file and not file.startswith(here)]
    IMPORTED.write_text(" ".join(elsewhere), encoding="utf-8")
    # Without waiting for threads that a fault has left behind.
    os._exit(status)


def _import_all(names: Sequence[str]) -> None:
    """Import modules; some cannot be imported by their names."""
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


if __name__ == "__main__":
    judge(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
