"""Hashing all tensors of a checkpoint in a folder of this node, on several threads.

Each thread takes the next piece of a tensor, reads it into a buffer of its own and hashes its
leaves. Reading and hashing let other Python threads run, so that the threads keep a disk and all
cores busy. Beside the leaves each thread has one piece in memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from cluster.errors import CheckpointError
from experts.checkpoint import hashes
from experts.checkpoint.shard_file import ShardFile, stamp_of_file
from experts.checkpoint.stored import Stored

Watch = Callable[[int, int], None]
"""Receives the bytes hashed so far, and those of all tensors; one thread at a time calls it."""

PIECE_LEAVES = 8
MIN_THREADS, MAX_THREADS = 4, 16
"""A disk is faster with several reads under way than with one for each core."""
CLOCK_STEP_S = 0.02
"""The longest step of the clock of file systems: two changes within a step have equal times."""


def hash_tensors(checkpoint: Stored, watch: Watch | None = None) -> dict[str, bytes]:
    """Return the leaves of every tensor by name; see :mod:`experts.checkpoint.hashes`.

    Raises :class:`CheckpointError` when a file cannot be read, or is not the one that was opened,
    or changes before the last byte is read.
    """
    _wait_for_the_clock(checkpoint)
    hashing = _Hashing(checkpoint, watch)
    num_threads = min(MAX_THREADS, max(MIN_THREADS, os.cpu_count() or 1))
    with ThreadPoolExecutor(num_threads, "hashing") as pool:
        threads = [pool.submit(hashing.work) for _ in range(num_threads)]
        try:
            for thread in threads:
                thread.result()
        finally:
            hashing.stop()
    for file, stamp in checkpoint.stamps.items():
        if stamp_of_file(checkpoint.folder / file) != stamp:
            raise CheckpointError("has changed while it was hashed", str(checkpoint.folder / file))
    return {name: bytes(leaves) for name, leaves in hashing.leaves.items()}


def _wait_for_the_clock(checkpoint: Stored) -> None:
    """Wait until a further change of a file would get another ctime than its last change.

    The wall clock is read because file systems do. A wrong clock costs only this care.
    """
    changed_at_s = max((stamp.ctime_ns for stamp in checkpoint.stamps.values()), default=0) / 1e9
    age_s = time.time() - changed_at_s
    if 0 <= age_s < CLOCK_STEP_S:
        time.sleep(CLOCK_STEP_S - age_s)


class _Hashing:
    """The pieces that the threads share, and the leaves that they fill in."""

    def __init__(self, checkpoint: Stored, watch: Watch | None) -> None:
        self._checkpoint = checkpoint
        self._watch = watch
        self.leaves = {
            name: bytearray(hashes.num_leaves(info.num_bytes) * hashes.HASH_BYTES)
            for name, info in checkpoint.tensors.items()
        }
        self._all_bytes = checkpoint.num_bytes
        self._done_bytes = 0
        self._piece_bytes = PIECE_LEAVES * hashes.LEAF_BYTES
        self._pieces = self._make_pieces()
        self._lock = threading.Lock()

    def _make_pieces(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, begin and end of every piece, in the order of the files' bytes."""
        tensors = self._checkpoint.tensors
        for name in sorted(tensors, key=lambda name: (tensors[name].file, tensors[name].begin)):
            num_bytes = tensors[name].num_bytes
            for begin in range(0, num_bytes, self._piece_bytes):
                yield name, begin, min(num_bytes, begin + self._piece_bytes)

    def stop(self) -> None:
        """Let every thread end after its present piece."""
        with self._lock:
            self._pieces = iter(())

    def work(self) -> None:
        """Hash pieces until none is left, in one thread."""
        buffer = memoryview(bytearray(self._piece_bytes))
        file: ShardFile | None = None
        file_name = ""
        with ExitStack() as opened:
            while (piece := self._next()) is not None:
                name, begin, end = piece
                info = self._checkpoint.tensors[name]
                if file is None or file_name != info.file:
                    opened.close()
                    file, file_name = opened.enter_context(self._open(info.file)), info.file
                data = buffer[: end - begin]
                file.read(info.begin + begin, data)
                place = begin // hashes.LEAF_BYTES * hashes.HASH_BYTES
                leaves = hashes.leaf_hashes(data)
                self.leaves[name][place : place + len(leaves)] = leaves
                self._count(len(data))

    def _open(self, name: str) -> ShardFile:
        file = ShardFile(self._checkpoint.folder / name)
        if file.stamp != self._checkpoint.stamps[name]:
            raise CheckpointError("has changed since it was opened", str(file.path))
        return file

    def _next(self) -> tuple[str, int, int] | None:
        with self._lock:
            return next(self._pieces, None)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            if self._watch is not None:
                self._watch(self._done_bytes, self._all_bytes)
