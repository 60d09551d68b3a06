"""The record of a host's accesses to the emulated device: copies, host reads, mixed operations.

:mod:`tests.emulated_device` fills the record; a test reads it.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRODUCT = tuple(
    str(ROOT / package) + "/" for package in ("cluster", "experts", "router", "workshop")
)
"""Where the product's code lies; an access is ascribed to it before any test."""
TESTS = str(ROOT / "tests") + "/"
EMULATION = str(ROOT / "tests" / "emulated_")


class Kind(StrEnum):
    """The kinds of access."""

    TO_DEVICE = "copy to the device"
    TO_HOST = "copy to the host"
    HOST_READ = "implicit host read"
    MIXED = "operation on tensors of host and device"


@dataclass(frozen=True, slots=True)
class Access:
    """One access of the host to the device.

    ``where`` is ``file:line`` of the innermost product code, or of the test where there is none.
    ``is_pinned`` is true for a copy from or to pinned host memory. ``is_blocking`` is false for a
    copy with ``non_blocking``.
    """

    kind: Kind
    operation: str
    num_bytes: int
    where: str
    is_pinned: bool = False
    is_blocking: bool = True

    def __str__(self) -> str:
        """Return a line for a failing test."""
        return f"{self.kind} ({self.operation}, {self.num_bytes} bytes) at {self.where}"


@dataclass(slots=True)
class Copies:
    """The accesses of one section, in their order."""

    accesses: list[Access] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Access]:
        """Return the accesses of one kind."""
        return [access for access in list(self.accesses) if access.kind is kind]

    @property
    def to_device(self) -> list[Access]:
        """The copies host → device."""
        return self.of(Kind.TO_DEVICE)

    @property
    def to_host(self) -> list[Access]:
        """The copies device → host."""
        return self.of(Kind.TO_HOST)

    @property
    def host_reads(self) -> list[Access]:
        """The implicit host reads, also those that have raised."""
        return self.of(Kind.HOST_READ)

    @property
    def mixed(self) -> list[Access]:
        """The operations on tensors of host and device, also those that have raised."""
        return self.of(Kind.MIXED)

    def by_line(self) -> Counter[tuple[Kind, str]]:
        """Return the number of accesses by kind and by ``file:line``."""
        return Counter((access.kind, access.where) for access in list(self.accesses))

    def clear(self) -> None:
        """Forget the accesses so far."""
        self.accesses.clear()

    def __str__(self) -> str:
        """Return a line for each access."""
        return "\n".join(map(str, list(self.accesses))) or "no access"


@dataclass(frozen=True, slots=True)
class _Section:
    copies: Copies
    tolerates: bool


class AccessLog:
    """The open sections of one device; accesses of any thread go to all of them."""

    def __init__(self) -> None:
        """Begin without a section."""
        self._lock = threading.Lock()
        self._sections: list[_Section] = []

    @contextmanager
    def section(self, tolerates: bool) -> Iterator[Copies]:
        """Record accesses until the end; host reads and mixed operations pass if it ``tolerates``.

        Sections may nest, and overlap from thread to thread.
        """
        section = _Section(Copies(), tolerates)
        with self._lock:
            self._sections.append(section)
        try:
            yield section.copies
        finally:
            with self._lock:
                # By identity: two sections without accesses are equal.
                self._sections = [kept for kept in self._sections if kept is not section]

    def record(self, access: Access) -> bool:
        """Record an access; returns whether an open section tolerates what is forbidden."""
        with self._lock:
            for section in self._sections:
                section.copies.accesses.append(access)
            return any(section.tolerates for section in self._sections)


def calling_line() -> str:
    """Return ``file:line`` of the innermost frame of the product's code, else of the test's."""
    frame = sys._getframe(1)
    fallback = "unknown"
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith((*PRODUCT, TESTS)) and not file.startswith(EMULATION):
            line = f"{file.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
            if file.startswith(PRODUCT):
                return line
            if fallback == "unknown":
                fallback = line
        frame = frame.f_back
    return fallback
