"""Trains the bundled mixtures anew, with their cards.

    python -m benchmarks.bundled [NAME ...] [--out FOLDER]

Each is written to a folder of its name below ``--out``, by default ``deploy/models``, checked as
`expertmesh check` does, and measured on held-out rows as it is served: its gate, experts and
combination loaded from the folder.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from benchmarks.bundled.trained import Begin
from benchmarks.common import progress
from experts.backends.check import check_mixture
from experts.checkpoint.mixture import Mixture, open_mixture
from experts.mixture.parts import MIXTURE_FILE
from tests.local_mixture import LocalMixture
from workshop.estimators.saved.folder import document_bytes, write

NAMES = ("digits", "diabetes", "hierarchy", "sequences")
BUNDLED = Path(__file__).parents[2] / "deploy" / "models"


CARD_FILE = "README.md"


def save_mixture(folder: Path, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> Mixture:
    """Write a mixture's folder anew, without its card; returns it opened.

    Other files of weights and of estimators in the folder are deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.rglob("*.skops"), *folder.glob("*.safetensors"), *folder.glob("*.json")):
        old.unlink()
    write(folder, {MIXTURE_FILE: document_bytes(spec), **files})
    return open_mixture(folder)


def make(name: str, out: Path, begin: Begin) -> Mixture:
    """Train one mixture and write its folder; returns it opened and checked."""
    torch.set_num_threads(1)
    with threadpool_limits(1):  # sums in one order, whatever the number of cores
        trained = importlib.import_module(f"benchmarks.bundled.{name}").train(begin)
        mixture = save_mixture(out / name, trained.spec, trained.files)
        check_mixture(mixture)
        card = trained.card(mixture, LocalMixture(mixture))
    (out / name / CARD_FILE).write_text(card, encoding="utf-8")
    return mixture


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bundled", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=BUNDLED, help="the folder of the folders")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"{name!r} is not one of {', '.join(NAMES)}")
    for name in options.names or NAMES:
        num_steps = importlib.import_module(f"benchmarks.bundled.{name}").NUM_STEPS
        with progress(name, num_steps) as begin:
            mixture = make(name, options.out, begin)
        print(f"{mixture.folder}: {mixture.num_bytes} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
