"""The progress bar of long commands and fits, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnProgress = Callable[[str, int, int], None]
"""Receives a phase, how many of its units are done, and how many it has."""


@contextmanager
def bar(
    text: str, total: int | None = None, is_shown: bool | None = None
) -> Iterator[Callable[..., None]]:
    """Show a bar, by default at a terminal; yields rich's ``update`` of it, which takes ``remark``.

    Other keywords are those of ``rich.progress.Progress.update``.
    """
    console = Console(stderr=True)
    is_shown = console.is_terminal if is_shown is None else is_shown
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[remark]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not is_shown) as progress:
        yield partial(progress.update, progress.add_task(text, total=total, remark=""))


@contextmanager
def phases(first: str) -> Iterator[OnProgress]:
    """Show a bar of the phase under way, where stderr is a terminal."""
    with bar(first) as update:
        yield lambda phase, done, total: update(description=phase, completed=done, total=total)
