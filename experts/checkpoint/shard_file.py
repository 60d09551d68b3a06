"""Reading bytes of one safetensors file, and noticing that the file has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cluster.errors import CheckpointError


class Stamp(NamedTuple):
    """What changes with a file's content: its inode, bytes, and times in nanoseconds.

    ``ctime_ns`` also changes where ``mtime_ns`` is put back.
    """

    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int


def stamp_of(stat: os.stat_result) -> Stamp:
    """Return the stamp in a result of ``stat``."""
    return Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def stamp_of_file(file: Path) -> Stamp:
    """Return a file's stamp; raises :class:`CheckpointError` naming it."""
    with _named(file):
        return stamp_of(file.stat())


class ShardFile:
    """An open file; a context manager that closes it."""

    def __init__(self, file: Path) -> None:
        """Open the file; raises :class:`CheckpointError` naming it."""
        self.path = file
        with _named(file):
            self._file = file.open("rb", buffering=0)

    def __enter__(self) -> ShardFile:
        """Return the file."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the file."""
        self._file.close()

    @property
    def stamp(self) -> Stamp:
        """The stamp of the open file, also where another one has taken its name."""
        with _named(self.path):
            return stamp_of(os.fstat(self._file.fileno()))

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on.

        Raises :class:`CheckpointError` when the file cannot be read or ends before.
        """
        done = 0
        with _named(self.path):
            self._file.seek(offset)
            while done < len(buffer):
                count = self._file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError("the file has become shorter", str(self.path))
                done += count


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turn an error of the system into a :class:`CheckpointError` naming the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(file)) from None
