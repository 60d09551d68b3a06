"""A peer's adapter whose number format says how it behaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.peers import side


class FakePeer:
    """Counts upwards from the last token of each prompt."""

    version = "fake 1"

    def __init__(self, task: side.Task) -> None:
        """Misbehave while loading where the format says so."""
        self._is_short = task.format == "short"
        if task.format == "crash":
            print("no such number format")
            sys.exit(3)
        if task.format == "silent":
            os._exit(0)
        if task.format == "hang":
            child = subprocess.Popen(["sleep", "600"])
            print(f"child {child.pid}", flush=True)
            time.sleep(600)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> side.Tokens:
        """Return the next numbers; with the format ``short`` one too few."""
        count = tokens - 1 if self._is_short else tokens
        return [[ids[-1] + 1 + i for i in range(count)] for ids in prompts]


if __name__ == "__main__":
    side.main(FakePeer)
