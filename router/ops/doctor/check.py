"""The verdict on a part of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict on a part of the machine: its state, and advice where it is not ok."""

    name: str
    level: Level
    found: str
    advice: str = ""
