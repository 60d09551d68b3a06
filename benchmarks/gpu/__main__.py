"""Proves on a machine with an accelerator what the other tests cannot: parity, speed, kill, memory.

    benchmarks/gpu.sh [FOLDER]

Takes less than ten minutes, on a Ray of its own. Writes ``results.json``, ``results.md`` and a log
of each part into the folder, by default ``gpu-results``. The exit status is 1 if a part failed or a
figure was missed, and 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TIME_S = 590.0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    started_s = time.monotonic()
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-results"))
    options = parser.parse_args(argv)
    from benchmarks.gpu.needs import refusal

    if reason := refusal():
        print(f"benchmarks/gpu.sh: {reason}", file=sys.stderr)
        return 2
    from benchmarks.common import exit_on_sigterm
    from benchmarks.gpu.command import run
    from benchmarks.gpu.settings import Settings

    exit_on_sigterm()
    return run(Settings(f"expertmesh-gpu-{time.time_ns():x}-"), options.folder, started_s + TIME_S)


if __name__ == "__main__":
    sys.exit(main())
