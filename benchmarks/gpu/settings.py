"""What the command measures, as plain data that its parts get."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import LARGE, MEDIUM, SMALL

FILE = "settings.json"
ACTORS_SHARE = 0.8
"""The part of the card that all actors reserve in Ray; the router of a deployment has the rest."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The sizes of all parts.

    ``device`` is ``accelerator``, or ``cpu`` for tests of the command; ``device_bytes`` are free on
    it. Of ``models`` the last is the largest. ``label`` begins the names of all temporary folders.
    """

    label: str
    device: str = "accelerator"
    device_bytes: int = 0
    families: tuple[str, ...] | None = None
    """The families of the parity; ``None`` for all."""
    models: tuple[dict[str, Any], ...] = (SMALL, MEDIUM, LARGE)
    streams: tuple[str, ...] = ("32", "1")
    tokens: int = 32
    rounds: int = 3
    actors: tuple[int, ...] = (1, 2)
    kill_streams: int = 32
    kill_actors: int = 3
    quiet_s: float = 8.0
    kill_s: float = 20.0

    def save(self, folder: Path) -> None:
        """Write the settings into a folder."""
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Settings:
        """Read the settings in a folder."""
        given = json.loads((folder / FILE).read_text(encoding="utf-8"))
        listed = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        return Settings(**{**given, **listed})

    @property
    def has_device(self) -> bool:
        """Whether anything computes on an accelerator."""
        return self.device != "cpu"

    def actor_gpus(self, actors: int) -> float:
        """Return what each of so many actors reserves of the card."""
        return math.floor(1000 * ACTORS_SHARE / actors) / 1000 if self.has_device else 0.0
