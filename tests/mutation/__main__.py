"""Plants small faults in core files and says which share of them the unit tests find.

    python -m tests.mutation [--files FILE ...] [--json FILE] [--write]

The files, the tests that judge each, the seed and the last result are in ``baseline.yaml``.
The status is 1 if a smaller share of a file's faults is found than there. Faults that change no
behaviour count as not found. ``--write`` makes the result the baseline: do so after a change of a
file's code, which draws other mutants, so that only changed tests can lower a share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).parents[2]
BASELINE = Path(__file__).parent / "baseline.yaml"
NUM_FILES_AT_A_TIME = 2
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
Verdicts = list[dict[str, Any]]
"""Of one file's mutants: each is a :class:`tests.mutation.judge.Verdict`."""


def judged(baseline: dict[str, Any], progress: Progress, name: str) -> Verdicts:
    """Judge a file's mutants in a copy of the repository.

    There are no verdicts where its tests fail without a fault, which the judge says.
    """
    arguments = [name, str(baseline["seed"]), str(baseline["mutants"])]
    command = [sys.executable, "-m", "tests.mutation.judge", *arguments]
    command += baseline["files"][name]["tests"]
    task = progress.add_task(name, total=None)
    verdicts: Verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build"))
        settings = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
        settings |= {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
        settings.pop("PYTHONDONTWRITEBYTECODE", None)  # each mutant would compile all code anew
        with subprocess.Popen(
            command, cwd=tree, env=settings, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            progress.update(task, total=int(process.stdout.readline() or 0))
            for line in process.stdout:
                verdicts.append(json.loads(line))
                progress.advance(task)
    progress.console.print(f"{name}: {share(verdicts):.0%} found")
    return verdicts


def share(verdicts: Verdicts) -> float:
    """Return the share of the mutants that the tests noticed, by a failure or by no end."""
    found = sum(verdict["outcome"] != "survived" for verdict in verdicts)
    return found / max(len(verdicts), 1)


def table(results: dict[str, Verdicts], before: dict[str, float]) -> Table:
    """Return the results beside the shares of the baseline."""
    shown = Table("file", "mutants", "found", "baseline", "s")
    for name, verdicts in results.items():
        took_s = sum(verdict["took_s"] for verdict in verdicts)
        shares = f"{share(verdicts):.0%}", f"{before[name]:.0%}"
        shown.add_row(name, str(len(verdicts)), *shares, f"{took_s:.0f}")
    every = [verdict for verdicts in results.values() for verdict in verdicts]
    shown.add_row("all", str(len(every)), f"{share(every):.0%}", end_section=True)
    return shown


def main() -> int:
    """Judge as the command line says; returns 1 if fewer faults are found than before."""
    baseline = yaml.safe_load(BASELINE.read_text(encoding="utf-8"))
    before = {name: float(entry.get("found", 0)) for name, entry in baseline["files"].items()}
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--files", nargs="+", choices=before, default=list(before), metavar="FILE")
    parser.add_argument("--json", type=Path, help="write every mutant and its outcome here")
    parser.add_argument("--write", action="store_true", help="renew baseline.yaml")
    options = parser.parse_args()
    with (
        Progress(*COLUMNS, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(NUM_FILES_AT_A_TIME) as threads,
    ):
        judging = threads.map(partial(judged, baseline, progress), options.files)
        results = dict(zip(options.files, judging, strict=True))
    Console(width=100).print(table(results, before))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.write:
        for name, verdicts in results.items():
            baseline["files"][name]["found"] = round(share(verdicts), 4)
        BASELINE.write_text(yaml.safe_dump(baseline, sort_keys=False), encoding="utf-8")
        return 0
    return int(any(round(share(v), 4) < before[name] for name, v in results.items()))


if __name__ == "__main__":
    sys.exit(main())
