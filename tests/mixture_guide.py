"""The commands of ``docs/mixtures.md``, as they stand: those that fit, and those after `serve`."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

from typer.testing import CliRunner

from router.cli.app import app
from tests.readme import ROOT, Block, Place, Step, blocks, run_console, shown, steps

GUIDE = ROOT / "docs" / "mixtures.md"
SERVE = "expertmesh serve pieces"
MODEL = "pieces"
MAX_COMMANDS = 10


def commands() -> tuple[list[Step], list[Step]]:
    """Return the steps before and after the command that serves."""
    [block] = [b for b in blocks(GUIDE.read_text(encoding="utf-8")) if b.language == "console"]
    planned = steps(block.text)
    assert len(planned) <= MAX_COMMANDS
    [number] = [number for number, step in enumerate(planned) if step.command == SERVE]
    return planned[:number], planned[number + 1 :]


def fit_by_guide(folder: Path) -> Path:
    """Write the guide's files into a new folder and run its `fit`; returns the mixture's folder."""
    folder.mkdir()
    document = blocks(GUIDE.read_text(encoding="utf-8"))
    (folder / "pieces.yaml").write_text(next(b.text for b in document if b.language == "yaml"))
    making = next(block.text for block in document if block.language == "py")
    [fit] = commands()[0]
    with chdir(folder):
        exec(making, {})
        result = CliRunner().invoke(app, fit.command.split()[1:])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"saved in {MODEL}; next: {SERVE}, and in")
    return folder / MODEL


def run(planned: list[Step], place: Place) -> list[Step]:
    """Run steps in one shell; returns them with what they print."""
    return steps(run_console(Block("console", shown(planned), 0), place))
