"""Hashing the checkpoints of a deployment file: ``check --verify``, and a start's first minute."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.hash_cache import BESIDE, keep, read_kept
from experts.checkpoint.identity import identity_of
from router.cli.app import app
from router.ops import hashing
from router.ops.hashing import checkpoints_of, keep_hashes
from router.ops.plan.sizes import format_size
from router.served import check_file
from tests.checkpoints import save_mixtral
from tests.unit.experts.checkpoint.changed_files import flip_in_tensor

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_mixtral(path)
    return path


@pytest.fixture
def file(folder: Path) -> Path:
    """A deployment file with two models of one checkpoint."""
    models = [{"id": model_id, "path": str(folder)} for model_id in ("a", "b")]
    args = {"models": models}
    application = {"name": "x", "import_path": "router.app:build", "args": args}
    path = folder.parent / "cluster.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
    return path


def verify(file: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["check", str(file), "--verify", *options])


def test_verifying_says_what_was_kept_and_keeps_the_new_hashes(file: Path, folder: Path) -> None:
    assert CliRunner().invoke(app, ["check", str(file)]).exit_code == 0
    assert not (folder / BESIDE).exists()

    def last_line() -> str:
        done = verify(file)
        assert (done.exit_code, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[:-1] == check_file(file)  # one checkpoint, one line
        return lines[-1]

    line = last_line()
    assert line.startswith(f"hashes of {folder}: identity ")
    assert line.endswith(f"none were kept before; kept in {folder / BESIDE}")
    identity = identity_of(open_checkpoint(folder))
    size = format_size(open_checkpoint(folder).num_bytes)
    assert f"identity {identity}, {size} in" in line
    assert "equal to those kept before" in last_line()
    flip_in_tensor(folder, NORM)
    line = last_line()
    assert "other ones were kept of files that have been changed since" in line
    assert identity not in line
    (folder / BESIDE).write_bytes(b"damaged")
    assert "none were kept before" in last_line()


def test_verifying_as_json(file: Path, folder: Path) -> None:
    identity = identity_of(open_checkpoint(folder))
    done = verify(file, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert told["ok"] is True
    [hashes] = told["hashes"]
    assert hashes.pop("duration_s") > 0
    assert hashes == {
        "folder": str(folder),
        "identity": identity,
        "num_bytes": open_checkpoint(folder).num_bytes,
        "kept": "equal",
        "file": str(folder / BESIDE),
    }
    assert len(told["checks"]) == len(check_file(file)) + 1


def test_damage_is_a_line_and_2(file: Path, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    identity_of(checkpoint)
    keep(checkpoint, {**read_kept(checkpoint).leaves, NORM: bytes(32)})
    done = verify(file)
    assert (done.exit_code, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"expertmesh: {file}: applications.x.args.models[0].path: {folder}")
    assert NORM in line
    done = verify(file, "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"]) == (2, False)
    assert "though the file looks unchanged" in told["error"]["message"]


def console(is_terminal: bool) -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(file=shown, force_terminal=is_terminal, width=100), shown


def test_a_terminal_has_a_bar_while_hashes_are_made_and_none_when_they_are_kept(
    file: Path, folder: Path
) -> None:
    terminal, shown = console(is_terminal=True)
    keep_hashes(checkpoints_of(file), terminal)
    assert "expertmesh: hashing model" in shown.getvalue()
    assert read_kept(open_checkpoint(folder)).is_current
    terminal, shown = console(is_terminal=True)
    keep_hashes(checkpoints_of(file), terminal)
    assert "hashing" not in shown.getvalue()


def test_a_log_has_a_line_for_a_checkpoint_that_takes_long(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, shown = console(is_terminal=False)
    keep_hashes(checkpoints_of(file), log)
    assert shown.getvalue() == ""
    (folder / BESIDE).unlink()
    monkeypatch.setattr(hashing, "LOGGED_BYTES", 1_000_000)
    keep_hashes(checkpoints_of(file), log)
    line = f"expertmesh: hashing model, 0.0 GB: once; kept in {folder / BESIDE}\n"
    assert shown.getvalue() == line


def test_a_checkpoint_that_changes_before_it_is_hashed_is_an_error(
    file: Path, folder: Path
) -> None:
    checkpoints = checkpoints_of(file)
    flip_in_tensor(folder, NORM)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        keep_hashes(checkpoints, console(is_terminal=False)[0])
