"""Finds the seed at which a world notices each mutant: ``python -m tests.world.mutants.find``.

Each mutant is a patch beside this file; the text before its first diff is its story. A copy of the
repository with the patch runs seed after seed, in processes of its own, until a law is broken that
the code as it is does not break for that seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
PACKAGES = ("cluster", "experts", "router", "tests/world")
"""What a copy of the repository needs to run a world."""
_RUN = "tests.world.mutants.seeds"


@dataclass(frozen=True)
class Found:
    """What a search has come to; ``law`` is empty where no seed breaks one."""

    mutant: str
    story: str
    law: str
    seed: int | None
    num_seeds: int
    took_s: float


@dataclass(frozen=True)
class Patch:
    """A mutant: its name, its story, and its file."""

    name: str
    story: str
    file: Path


def patches(names: Sequence[str] = ()) -> list[Patch]:
    """Return the mutants of these names, or all; raises ``ValueError`` for an unknown name."""
    found = [
        Patch(file.stem, file.read_text().partition("diff --git")[0].strip(), file)
        for file in sorted(FOLDER.glob("*.patch"))
    ]
    if unknown := set(names) - {patch.name for patch in found}:
        raise ValueError(f"no mutant: {', '.join(sorted(unknown))}")
    return [patch for patch in found if not names or patch.name in names]


def apply(patch: Path, folder: Path, *, check: bool = False) -> None:
    """Apply a patch to the tree in ``folder``, or only ``check`` it.

    ``folder`` need not be a checkout. Raises ``RuntimeError`` where the patch does not fit.
    """
    # Inside a checkout git would look for the files from its root on; outside it takes the folder.
    settings = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    settings["GIT_DIR"] = str(folder / "no such repository")
    command = ["git", "apply", *(["--check"] if check else []), str(patch)]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{patch.name} does not apply: {done.stderr.strip()}")


def copy_tree(target: Path) -> None:
    """Copy what runs a world to a new folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=ignored)
    shutil.copy(ROOT / "tests/__init__.py", target / "tests/__init__.py")


def laws_of_seeds(tree: Path, seeds: range) -> Iterator[tuple[int, list[str]]]:
    """Run seeds in a tree, one after the other; yields each with the laws that it breaks."""
    settings = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-m", _RUN, str(seeds.start), str(seeds.stop)]
    with subprocess.Popen(command, cwd=tree, env=settings, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                seed, laws = json.loads(line)
                yield seed, laws
        finally:
            process.kill()
    if process.returncode > 0:
        raise RuntimeError(f"the run of {tree} ended with {process.returncode}")


def find(patch: Patch, seeds: range) -> Found:
    """Look for the first of ``seeds`` at which a mutant breaks a law that is whole without it."""
    begun_at_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        apply(patch.file, tree)
        for seed, laws in laws_of_seeds(tree, seeds):
            new = [law for law in laws if law not in _laws_before(seed)] if laws else []
            if new:
                num_seeds = seed - seeds.start + 1
                took_s = time.monotonic() - begun_at_s
                return Found(patch.name, patch.story, new[0], seed, num_seeds, took_s)
    return Found(patch.name, patch.story, "", None, len(seeds), time.monotonic() - begun_at_s)


def _laws_before(seed: int) -> list[str]:
    """Return the laws that a seed breaks without any mutant."""
    [(_, laws)] = laws_of_seeds(ROOT, range(seed, seed + 1))
    return laws


def table(found: Sequence[Found]) -> str:
    """Return the outcomes as a table of Markdown."""
    rows = ["| mutant | story | law | seed | seeds tried | s |", "|---|---|---|---|---|---|"]
    for f in found:
        seed = "-" if f.seed is None else str(f.seed)
        law = f.law or "none is broken"
        rows.append(f"| {f.mutant} | {f.story} | {law} | {seed} | {f.num_seeds} | {f.took_s:.0f} |")
    return "\n".join(rows)


def main() -> int:
    """Search as the command line says; returns 1 where a mutant was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants; all without any")
    parser.add_argument("--seeds", default="0:1000", help="begin and end (0:1000)")
    parser.add_argument("--processes", type=int, default=1, help="mutants searched at a time (1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    begin, end = map(int, options.seeds.split(":"))
    with ThreadPoolExecutor(options.processes) as threads:
        searches = threads.map(lambda patch: find(patch, range(begin, end)), patches(options.names))
        found = []
        for one in searches:
            found.append(one)
            print(f"{one.mutant}: {one.law or '-'} ({one.seed})", file=sys.stderr, flush=True)
    print(json.dumps([asdict(one) for one in found]) if options.json else table(found))
    return int(any(one.seed is None for one in found))


if __name__ == "__main__":
    sys.exit(main())
