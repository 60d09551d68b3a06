"""A commit's code in a folder of its own, and the processes that run it.

The checkout needs no virtual environment: it is run by this interpreter and finds itself first, so
that both sides of a pair have the same packages.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pair_side
from benchmarks.processor_time import ProcessId, ProcessTime, libraries_loaded, serving_times

ROOT = Path(__file__).resolve().parents[1]
BUILD_S, START_S, ROUND_S, END_S = 600.0, 300.0, 300.0, 60.0
LOG_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit of this repository: its full hash, and the first line of its message."""

    hash: str
    subject: str


def commit_of(name: str) -> Commit:
    """Return the commit of a name; raises ``ValueError`` where there is none."""
    done = _git("show", "--no-patch", "--format=%H %s", f"{name}^{{commit}}", "--")
    if done.returncode:
        raise ValueError(f"{name} names no commit: {done.stderr.strip()}")
    hash_, _, subject = done.stdout.rstrip("\n").partition(" ")
    return Commit(hash_, subject)


def uncommitted() -> list[str]:
    """Return the working tree's changes that are in no commit, as ``git status`` prints them."""
    return _git("status", "--porcelain").stdout.splitlines()


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def check_out(commit: Commit, folder: Path) -> Path:
    """Write a commit's files to ``folder`` and build its native code there; returns the folder.

    Uses ``git archive``, which leaves nothing in the repository. Raises ``RuntimeError`` with the
    output of the command that fails, and where no native code came of it.
    """
    archive, built = folder.with_suffix(".tar"), folder.with_suffix(".built")
    folder.mkdir()
    _run(["git", "-C", str(ROOT), "archive", "--output", str(archive), commit.hash])
    _run(["tar", "-x", "-f", str(archive), "-C", str(folder)])
    archive.unlink()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    said = _run([*install, "--target", str(built), str(folder)])
    libraries = list(built.rglob("*.so"))
    if not libraries:
        raise RuntimeError(
            f"no native code was built of {commit.hash}; is a C compiler here?\n{said}"
        )
    for library in libraries:
        shutil.move(library, folder / library.relative_to(built))
    shutil.rmtree(built)
    shutil.copy(pair_side.__file__, folder / "benchmarks")
    return folder


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BUILD_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-LOG_CHARS:]}")
    return done.stdout


class Side:
    """A checkout's ``benchmarks.pair_side``, and all processes below it."""

    def __init__(self, checkout: Path, benchmark: str, model: Path) -> None:
        """Start it; :meth:`wait` returns what it says when it is ready."""
        self._checkout = checkout
        self._root_name = "router" if benchmark == "decode" else None
        self._log = checkout.with_suffix(".log")
        self._below: list[Any] = []
        self._is_ready = False
        paths = [str(checkout), os.environ.get("PYTHONPATH", "")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.pair_side", benchmark, str(model)],
                cwd=checkout,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends its sides
            )

    def wait(self, timeout_s: float = START_S) -> dict[str, Any]:
        """Return the next reply.

        Raises ``RuntimeError`` with the end of the side's log when it ends or is silent.
        """
        out = self._process.stdout
        assert out is not None
        line = b""
        if select.select([out], [], [], timeout_s)[0]:
            line = out.readline()
        if not line:
            log = self._log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARS:]
            how = "ended" if self._process.poll() is not None else f"was silent for {timeout_s} s"
            raise RuntimeError(f"{self._checkout.name} {how}; its log ends:\n{log}")
        reply: dict[str, Any] = json.loads(line)
        self._is_ready = True
        return reply

    def generate(self, streams: int, tokens: int) -> int:
        """Have the engine of ``decode`` generate a round; returns the number of tokens."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(f"{streams} {tokens}\n".encode())
        return int(self.wait(ROUND_S)["tokens"])

    def times(self) -> dict[ProcessId, ProcessTime]:
        """Return the processor seconds of the side's serving processes."""
        return serving_times(self._process.pid, self._root_name)

    def check_code(self) -> None:
        """Raise ``RuntimeError`` unless all native code loaded is the checkout's."""
        own = set(self._checkout.rglob("*.so"))
        loaded = libraries_loaded(self.times(), {library.name for library in own})
        if not loaded or not loaded <= own:
            raise RuntimeError(f"{self._checkout.name} runs other code: {sorted(loaded)}")

    def begin_end(self) -> None:
        """Have the side end by itself."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            self._below = psutil.Process(self._process.pid).children(recursive=True)
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> None:
        """Wait until all processes of the side have ended.

        Kills them when they do not end, and at once while they are still starting: a side sees the
        end of its stdin when it is ready.
        """
        import psutil

        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S if self._is_ready else 0)
        finally:
            self._process.kill()
            self._process.wait()
            for process in self._below:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(self._below, timeout=END_S)
            assert self._process.stdout is not None
            self._process.stdout.close()


@contextmanager
def running(
    checkouts: Sequence[Path], benchmark: str, model: Path
) -> Iterator[tuple[list[Side], list[dict[str, Any]]]]:
    """Run the same benchmark of several checkouts until the block ends, in good order.

    Gives the sides, and what each said when it was ready. They start one after the other: Serve
    gives its proxies 15 s, which two starts at a time on two cores may exceed.
    """
    sides: list[Side] = []
    replies = []
    try:
        for checkout in checkouts:
            sides.append(Side(checkout, benchmark, model))
            replies.append(sides[-1].wait())
        yield sides, replies
    finally:
        for side in sides:
            side.begin_end()
        for side in sides:
            side.end()
