"""Runs all parts, and writes what came of them."""

from __future__ import annotations

import datetime
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import show_verdicts
from benchmarks.gpu.part import CARD, KILL, PARITY, model_part, parts_of
from benchmarks.gpu.parts import Outcome, Part, run_all
from benchmarks.gpu.report import document, verdicts_of
from benchmarks.gpu.settings import Settings

MODULE = "benchmarks.gpu.part"
CARD_LIMIT_S = 60.0


def run(settings: Settings, folder: Path, deadline_s: float) -> int:
    """Run the parts until ``deadline_s`` (monotonic); returns the exit status.

    The folder gets ``results.json``, ``results.md``, the parts' files and logs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder)

    def of(*parts: Part) -> list[Outcome]:
        return run_all(parts, folder, settings.label, deadline_s, say, MODULE)

    outcomes = of(Part(CARD, CARD_LIMIT_S))
    if outcomes[0].result is not None:  # else there is no device, and each part would say the same
        settings = replace(settings, device_bytes=outcomes[0].result["free_bytes"])
        settings.save(folder)
        outcomes += of(*parts_of(settings))
    result = result_of(settings, outcomes)
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(document(result), encoding="utf-8")
    verdicts = verdicts_of(result)
    show_verdicts(f"on {settings.device}", verdicts)
    say(f"results and logs are in {folder}")
    is_ok = all(one.status == "ok" for one in outcomes) and all(one.is_kept for one in verdicts)
    return int(not is_ok)


def result_of(settings: Settings, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return what ``results.json`` has."""
    results = {one.name: one.result for one in outcomes}
    models = [results.get(model_part(number)) for number in range(len(settings.models))]
    return {
        "benchmark": "gpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "card": results[CARD],
        "parity": results.get(PARITY),
        "kill": results.get(KILL),
        "models": [model for model in models if model is not None],
        "parts": [
            {key: value for key, value in asdict(one).items() if key != "result"}
            for one in outcomes
        ],
    }


def say(line: str) -> None:
    """Print a line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
