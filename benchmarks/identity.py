"""How long the hashes of a checkpoint take: once, on a warm start, and while experts load.

    python -m benchmarks.identity [--gigabytes 10] [--rounds 3] [--folder FOLDER]
        [--json FILE] [--compare OLD.json]

Makes a synthetic Mixtral checkpoint in a temporary folder and removes it afterwards. "From disk"
means that the kernel was told to forget the files before; whatever lies below the file system may
still have them. Reading alone, in the same order on as many threads, is the floor. Promise: hashing
reaches 1 GB/s from disk, or 0.9 of what reading alone reaches where the disk is slower, and the
kept hashes take a tenth of that time at most.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import (
    Figure,
    Verdict,
    finish,
    machine,
    output_options,
    progress,
    show,
    show_verdicts,
)
from benchmarks.synthetic import MIXTRAL, bytes_of, write_checkpoint
from experts.checkpoint import hashes
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.hash_cache import BESIDE
from experts.checkpoint.hashing import hash_tensors
from experts.checkpoint.identity import hash_table_of, identity_of

PROMISED_GB_S = 1.0
LOADED_EXPERTS = 64
POOL_BYTES = 64 << 20
READ, DISK, CACHED, KEPT = (
    "read alone, from disk",
    "hash, from disk",
    "hash, from the file cache",
    "kept hashes",
)
PLAIN, VERIFIED = "load experts, plain", "load experts, verified"

CONFIG: dict[str, Any] = {
    **MIXTRAL,
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of one kind of run: seconds, processor seconds, and the bytes that were handled."""

    wall_s: float
    cpu_s: float
    num_bytes: int

    @property
    def gb_s(self) -> float:
        """Gigabytes in a second."""
        return self.num_bytes / self.wall_s / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds of a gigabyte."""
        return self.cpu_s / self.num_bytes * 1e9


def config_of(gigabytes: float, **changes: int) -> dict[str, Any]:
    """Return a configuration of about this size, in whole layers."""
    one, two = ({**CONFIG, **changes, "num_hidden_layers": layers} for layers in (1, 2))
    layer_bytes = bytes_of(two) - bytes_of(one)
    beside_bytes = bytes_of(one) - layer_bytes
    return {
        **one,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - beside_bytes) / layer_bytes)),
    }


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write a bf16 checkpoint of random bytes to the disk."""
    write_checkpoint(folder, config, memoryview(os.urandom(POOL_BYTES)), is_synced=True)


def forget(folder: Path) -> None:
    """Tell the kernel to drop the files from its cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(work: Callable[[], int]) -> Timing:
    """Run ``work``, which returns the bytes that it has handled."""
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    num_bytes = work()
    return Timing(time.perf_counter() - started_s, time.process_time() - started_cpu_s, num_bytes)


def median(timings: Sequence[Timing]) -> Timing:
    """Return the medians of several runs of one kind."""
    return Timing(
        statistics.median(timing.wall_s for timing in timings),
        statistics.median(timing.cpu_s for timing in timings),
        timings[0].num_bytes,
    )


def read_alone(folder: Path) -> int:
    """Read a checkpoint as hashing does, without hashing."""
    checkpoint = open_checkpoint(folder)
    with patch.object(hashes, "leaf_hashes", return_value=b""):
        hash_tensors(checkpoint)
    return checkpoint.num_bytes


def hash_all(folder: Path) -> int:
    """Hash a checkpoint of which no hashes are kept."""
    (folder / BESIDE).unlink(missing_ok=True)
    checkpoint = open_checkpoint(folder)
    identity_of(checkpoint)
    return checkpoint.num_bytes


def warm_start(folder: Path) -> int:
    """Open a checkpoint whose hashes are kept."""
    checkpoint = open_checkpoint(folder)
    hash_table_of(checkpoint)
    return checkpoint.num_bytes


def load_experts(checkpoint: Checkpoint) -> int:
    """Load the first experts, one after another."""
    from experts.checkpoint.expert_weights import load_expert

    shape = checkpoint.shape
    keys = [(layer, expert) for layer in shape.layers for expert in range(shape.num_experts)]
    return sum(
        load_expert(checkpoint, layer_id, expert_id, "bfloat16").num_bytes
        for layer_id, expert_id in keys[:LOADED_EXPERTS]
    )


def run(folder: Path, config: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Run the whole benchmark in an empty folder; returns what ``--json`` writes."""
    timings: dict[str, list[Timing]] = {
        kind: [] for kind in (READ, DISK, CACHED, KEPT, PLAIN, VERIFIED)
    }
    with progress("identity", 1 + rounds * len(timings)) as begin:
        begin("making the checkpoint")
        make_checkpoint(folder, config)
        plain = open_checkpoint(folder)
        load_experts(plain)  # imports torch
        from_disk = [(READ, read_alone), (DISK, hash_all)]
        for _ in range(rounds):
            for kind, work in from_disk:
                begin(kind)
                forget(folder)
                timings[kind].append(timed(partial(work, folder)))
            from_disk.reverse()  # the second one may find more in caches below the file system
            begin(CACHED)
            timings[CACHED].append(timed(lambda: hash_all(folder)))
            begin(KEPT)
            timings[KEPT].append(timed(lambda: warm_start(folder)))
            verified = replace(plain, hashes=hash_table_of(plain))
            for kind, checkpoint in ((PLAIN, plain), (VERIFIED, verified)):
                begin(kind)
                timings[kind].append(timed(partial(load_experts, checkpoint)))
    return {
        "benchmark": "identity",
        "machine": machine(),
        "sizes": {"num_bytes": plain.num_bytes, "tensors": len(plain.tensors)},
        **{kind: asdict(median(taken)) for kind, taken in timings.items()},
    }


def timing_of(result: dict[str, Any], kind: str) -> Timing:
    """Return one timing of a result."""
    return Timing(**result[kind])


def verdicts_of(result: dict[str, Any]) -> list[Verdict]:
    """Return what was promised, and what came of it."""
    read, disk, kept = (timing_of(result, kind) for kind in (READ, DISK, KEPT))
    floor_gb_s = min(PROMISED_GB_S, 0.9 * read.gb_s)
    return [
        Verdict(
            "hashing from disk, GB/s",
            f"{disk.gb_s:.2f}",
            f"at least {floor_gb_s:.2f}",
            disk.gb_s >= floor_gb_s,
        ),
        Verdict(
            "kept hashes, of the time",
            f"{kept.wall_s / disk.wall_s:.4f}",
            "at most 0.1",
            kept.wall_s <= 0.1 * disk.wall_s,
        ),
    ]


def print_result(result: dict[str, Any]) -> None:
    """Print the tables."""
    kinds = (READ, DISK, CACHED, KEPT, PLAIN, VERIFIED)
    timings = {kind: timing_of(result, kind) for kind in kinds}
    rows = [
        (
            kind,
            f"{timing.num_bytes / 1e9:.2f}",
            f"{timing.wall_s:.3f}",
            "" if kind == KEPT else f"{timing.gb_s:.2f}",
            "" if kind == KEPT else f"{timing.cpu_s_per_gb:.3f}",
        )
        for kind, timing in timings.items()
    ]
    tensors = result["sizes"]["tensors"]
    show(
        f"hashes of {tensors} tensors",
        rows,
        ["what", "GB", "s", "GB/s", "processor s / GB"],
    )
    show_verdicts("promises", verdicts_of(result))


def comparable(result: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by."""
    read, disk, cached, kept, plain, verified = (
        timing_of(result, kind) for kind in (READ, DISK, CACHED, KEPT, PLAIN, VERIFIED)
    )
    return {
        "read alone GB/s": Figure(read.gb_s, "context"),
        "hash from disk GB/s": Figure(disk.gb_s, "higher"),
        "hash from the file cache GB/s": Figure(cached.gb_s, "higher"),
        "kept hashes s": Figure(kept.wall_s, "lower"),
        "load plain, processor s/GB": Figure(plain.cpu_s_per_gb, "context"),
        "load verified, processor s/GB": Figure(verified.cpu_s_per_gb, "lower"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.identity", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    output_options(parser)
    options = parser.parse_args(argv)
    config = config_of(options.gigabytes)
    needed_bytes = bytes_of(config)
    place = options.folder or Path(tempfile.gettempdir())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < 1.1 * needed_bytes:
        print(
            f"{place}: {free_bytes / 1e9:.1f} GB are free, {1.1 * needed_bytes / 1e9:.1f} GB are "
            "needed; give another --folder, or fewer --gigabytes",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="expertmesh-identity-", dir=place) as folder:
        result = run(Path(folder), config, options.rounds)
    print_result(result)
    missed = not all(verdict.is_kept for verdict in verdicts_of(result))
    return max(int(missed), finish(result, comparable(result), options))


if __name__ == "__main__":
    sys.exit(main())
