"""Hostile bytes against every part that takes some from outside, for as long as is wanted.

    python -m benchmarks.fuzz [TARGET ...] [--minutes 1] [--seed N] [--engine ENGINE]
        [--keep FOLDER] [--json FILE]

Targets: frames, both ends of the streams and of both links, a checkpoint's files in each layout,
HTTP bodies, gRPC messages and statuses, and what callers say of themselves in headers and metadata.
With the engine ``atheris`` (``pip install 'expertmesh[fuzz]'``) libFuzzer looks for inputs that
reach new code; ``mutation`` needs nothing and mutates good inputs blindly. A finding is anything
but the refusal that a part promises: another error, a wrong answer, more than ten seconds or 4 GB.
The exit status is 1 when there was one; its input is kept in FOLDER.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import command, progress, show, write_json

TARGETS = (
    "frame", "stranger", "router", "actor", "link", "call-link", "link-handshake", "header",
    "index", "config", "params", "gguf", "tokenizer", "http", "protobuf", "infer",
    "infer-protobuf", "status", "headers", "metadata",
)  # fmt: skip
"""As in :mod:`benchmarks.fuzzing.targets`, which imports all that is fuzzed."""
START_S = 120.0
"""For imports and for the engine's end, beside the minutes."""
_SHOWN_LINES = 25


def fuzz(target: str, engine: str, minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Run one target in a process of its own; returns what became of it."""
    words = [sys.executable, "-m", "benchmarks.fuzzing.run", target, engine]
    words += [str(60 * minutes), str(seed), str(folder)]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60 * minutes + START_S,
        )
    except subprocess.TimeoutExpired:
        return {"target": target, "runs": 0, "peak_mb": 0, "finding": "did not end in time"}
    said = done.stderr
    finding = None if done.returncode == 0 else f"exit status {done.returncode}\n" + tail_of(said)
    return {
        "target": target,
        "runs": _number(said, "number_of_executed_units"),
        "peak_mb": _number(said, "peak_rss_mb"),
        "finding": finding,
    }


def tail_of(said: str) -> str:
    """Return the last lines of what a run said, without libFuzzer's dump of the input."""
    lines = [line for line in said.splitlines() if not line.startswith(("0x", "\\", "stat::"))]
    return "\n".join(line[:200] for line in lines[-_SHOWN_LINES:])


def _number(said: str, name: str) -> int:
    found = re.search(rf"stat::{name}:\s*(\d+)", said)
    return int(found[1]) if found else 0


def run(
    targets: Sequence[str], engine: str, minutes: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Run all targets one after the other; returns what ``--json`` writes."""
    results = []
    with progress("fuzz", len(targets)) as begin:
        for target in targets:
            begin(target)
            results.append(fuzz(target, engine, minutes, seed, folder))
    return {"engine": engine, "minutes": minutes, "seed": seed, "targets": results}


def report(result: Mapping[str, Any]) -> None:
    """Print the table, and what was found."""
    rows = [
        (*found, "[red]finding[/red]" if finding else "nothing")
        for *found, finding in map(dict.values, result["targets"])
    ]
    title = f"fuzz by {result['engine']}, {result['minutes']:g} minutes each, seed {result['seed']}"
    show(title, rows, ["target", "inputs|,", "peak MB", "found"])
    for one in result["targets"]:
        if one["finding"]:
            print(f"{one['target']}: {one['finding']}")


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command("fuzz", __doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random")
    has_atheris = importlib.util.find_spec("atheris") is not None
    parser.add_argument(
        "--engine",
        choices=["atheris", "mutation"],
        default="atheris" if has_atheris else "mutation",
        help="default: atheris where it is installed",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for inputs that failed")
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"unknown target {unknown[0]}; known: {', '.join(TARGETS)}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    targets = options.targets or TARGETS
    result = run(targets, options.engine, options.minutes, options.seed, folder)
    report(result)
    write_json("fuzz", result, options.json)
    return any(one["finding"] for one in result["targets"])


if __name__ == "__main__":
    sys.exit(main())
