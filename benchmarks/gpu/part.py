"""One part of the command, in this process.

    python -m benchmarks.gpu.part FOLDER NAME

Reads the settings from the folder, and writes the result there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import exit_on_sigterm
from benchmarks.gpu.parts import Part
from benchmarks.gpu.settings import Settings

CARD, PARITY, KILL = "card", "parity", "kill"
MODEL_LIMITS_S = (90.0, 100.0, 230.0)
"""The limits of small, medium and large models."""


def model_part(number: int) -> str:
    """Return the name of the part of a model."""
    return f"model-{number}"


def parts_of(settings: Settings) -> list[Part]:
    """Return the parts after the card, those first whose figures are promised."""
    limits_s = MODEL_LIMITS_S[-len(settings.models) :]
    models = [Part(model_part(i), limit_s) for i, limit_s in enumerate(limits_s)]
    return [Part(PARITY, 110.0), models[-1], Part(KILL, 140.0), *reversed(models[:-1])]


def run(settings: Settings, name: str, folder: Path) -> Any:
    """Run a part; returns what its file is to have."""
    if name == CARD:
        from benchmarks.gpu import card

        return card.run(settings.device)
    if name == PARITY:
        from benchmarks.gpu import parity
        from cluster.device import device_of

        device = device_of(settings.device, 0, "--device")
        return parity.run(device, settings.families or tuple(parity.FAMILIES))
    if name == KILL:
        from benchmarks.gpu import kill

        return kill.run(settings)
    from benchmarks.gpu import speed

    return speed.run(settings, int(name.removeprefix("model-")), folder)


def main() -> None:
    """Run the part that the command line names."""
    exit_on_sigterm()
    folder, name = Path(sys.argv[1]), sys.argv[2]
    result = run(Settings.load(folder), name, folder)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
