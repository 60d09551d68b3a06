"""Makes one document of what the benchmarks said: date, machine, each command and its output.

    python -m benchmarks.results FOLDER [--write FILE.md]

``benchmarks/all.sh`` fills FOLDER with four files a benchmark: ``NN-NAME.command``, ``.status``,
``.txt`` (what it printed) and ``.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.processor import processor_name


@dataclass(frozen=True, slots=True)
class Ran:
    """One benchmark that was run; ``result`` is ``None`` where it broke off before its end."""

    command: str
    status: int
    output: str
    result: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """The benchmark's name, as in its command."""
        return self.command.split()[2].removeprefix("benchmarks.")

    @property
    def verdict(self) -> str:
        """What its exit status says."""
        if self.result is None:
            return f"broke off (exit status {self.status})"
        return "missed or failed" if self.status else "well"


def read(folder: Path) -> list[Ran]:
    """Return what was run, in order; raises ``ValueError`` where there is nothing."""
    commands = sorted(folder.glob("*.command"))
    if not commands:
        raise ValueError(f"{folder} has no file *.command")
    return [_read_one(command) for command in commands]


def _read_one(command: Path) -> Ran:
    result = command.with_suffix(".json")
    return Ran(
        command.read_text(encoding="utf-8").strip(),
        int(command.with_suffix(".status").read_text(encoding="utf-8")),
        command.with_suffix(".txt").read_text(encoding="utf-8"),
        json.loads(result.read_text(encoding="utf-8")) if result.exists() else None,
    )


def machine_lines(ran: Sequence[Ran]) -> list[str]:
    """Return the machine's processor, cores and memory, and the versions that ran."""
    import psutil

    lines = [
        f"- {processor_name()}, {psutil.cpu_count()} cores",
        f"- {psutil.virtual_memory().total / 1e9:.0f} GB of memory",
    ]
    told: Mapping[str, Any] = next(
        (one.result["machine"] for one in ran if one.result is not None), {}
    )
    versions = [f"{key} {told[key]}" for key in ("python", "ray", "torch", "transformers") if told]
    return [*lines, f"- {', '.join(versions)}"] if versions else lines


def cleaned(output: str) -> str:
    """Return what a benchmark printed, without what Ray's own processes say in between."""
    lines = [line.rstrip() for line in output.splitlines() if "(raylet)" not in line]
    return "\n".join(lines).strip("\n")


def document(ran: Sequence[Ran], day: datetime.date, machine: Sequence[str]) -> str:
    """Return the whole document."""
    parts = [
        "# Results",
        f"Measured on {day.isoformat()}; [what each command measures](README.md).",
        "\n".join(machine),
        "\n".join(
            ["| Command | Ended |", "|---|---|"]
            + [f"| `{one.command}` | {one.verdict} |" for one in ran]
        ),
    ]
    for one in ran:
        parts += [f"## {one.name}", f"`{one.command}`", f"```\n{cleaned(one.output)}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Parse the command line and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what benchmarks/all.sh kept")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="default: standard output")
    options = parser.parse_args()
    try:
        ran = read(options.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    today = datetime.datetime.now(datetime.UTC).date()
    text = document(ran, today, machine_lines(ran))
    if options.write is None:
        sys.stdout.write(text)
    else:
        options.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
