"""Hashing the checkpoints of a deployment file, with a bar at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from experts.checkpoint.hashing import Watch
from experts.checkpoint.hub import name_of
from experts.checkpoint.identity import (
    LOGGED_BYTES,
    Verification,
    hashing_line,
    identity_of,
    verify_hashes,
)
from experts.checkpoint.stored import Stored
from router.ops.plan.sizes import format_size
from router.served import check_file, headers_alone

_KEPT = {
    "equal": "equal to those kept before",
    "none": "none were kept before",
    "outdated": "other ones were kept of files that have been changed since",
}


@contextmanager
def hashing_bar(console: Console) -> Iterator[Callable[[Stored], Watch]]:
    """Show how far the hashing of checkpoints is; yields what makes the watch of a checkpoint.

    A terminal has a bar. Anything else gets a line for a checkpoint that takes long.
    """
    bar = Progress(
        TextColumn("expertmesh: hashing {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    def watch_of(checkpoint: Stored) -> Watch:
        task = bar.add_task(name_of(checkpoint.folder), total=None, visible=False)
        is_begun = False

        def watch(done_bytes: int, all_bytes: int) -> None:
            nonlocal is_begun
            if not is_begun and not console.is_terminal and all_bytes >= LOGGED_BYTES:
                console.print(f"expertmesh: {hashing_line(checkpoint)}", soft_wrap=True)
            is_begun = True
            bar.update(task, completed=done_bytes, total=all_bytes, visible=True)

        return watch

    with bar:
        yield watch_of


def checkpoints_of(file: Path) -> list[Stored]:
    """Check a deployment file as :func:`router.served.check_file` does; returns its checkpoints."""
    opened: dict[Path, Stored] = {}

    def collect(stored: Stored) -> str:
        opened[stored.folder] = stored
        return headers_alone(stored)

    check_file(file, collect)
    return list(opened.values())


def keep_hashes(checkpoints: Sequence[Stored], console: Console) -> None:
    """Hash the checkpoints of which no current hashes are kept, before processes need them.

    Raises :class:`CheckpointError` for a file that cannot be read, or changes meanwhile.
    """
    with hashing_bar(console) as watch_of:
        for checkpoint in checkpoints:
            identity_of(checkpoint, watch_of(checkpoint))


def verify_file(file: Path, console: Console) -> tuple[list[str], list[Verification]]:
    """Check a deployment file, and hash every byte of its checkpoints anew.

    Returns the lines of both, and the result for each checkpoint. Raises :class:`ConfigError` or
    :class:`CheckpointError` for the first error.
    """
    verified: dict[Path, Verification] = {}
    with hashing_bar(console) as watch_of:

        def verify(checkpoint: Stored) -> str:
            if checkpoint.folder not in verified:
                done = verify_hashes(checkpoint, watch_of(checkpoint))
                verified[checkpoint.folder] = done
            return verified[checkpoint.folder].identity

        lines = check_file(file, verify)
    results = list(verified.values())
    return [*lines, *map(_line, results)], results


def _line(done: Verification) -> str:
    size, kept = format_size(done.num_bytes), _KEPT[done.kept]
    place = "they cannot be kept" if done.file is None else f"kept in {done.file}"
    return (
        f"hashes of {done.folder}: identity {done.identity}, {size} in {done.duration_s:.1f} s; "
        f"{kept}; {place}"
    )
