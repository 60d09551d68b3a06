"""``expertmesh serve``: what it refuses with a line, and what it hands to Serve's command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

import deploy
from router.cli import serve as module
from router.cli.app import app
from router.config import read_document

SHIPPED = Path(deploy.__file__).parent / "cluster.yaml"


class FakeServe:
    """Stands in for Serve's command; keeps what it was run with."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.told: list[list[str]] = []
        self.attended: list[tuple[list[str], str]] = []
        """The command lines whose files were checked and completed before."""

    def attend(self, command_line: list[str], file: Path) -> None:
        self.attended.append((command_line, str(file)))

    def load(self) -> FakeServe:
        return self

    def main(self, args: list[str], **options: Any) -> None:
        self.told.append([*args])
        assert options == {"prog_name": "serve", "standalone_mode": False}
        if self.error is not None:
            raise self.error


def run(monkeypatch: pytest.MonkeyPatch, serve: FakeServe, *args: str) -> Result:
    asked: list[Any] = []

    def entry_points(**wanted: str) -> list[FakeServe]:
        asked.append(wanted)
        return [serve]

    monkeypatch.setattr(module, "entry_points", entry_points)
    monkeypatch.setattr("router.ops.startup.preflight.attend", serve.attend)
    return CliRunner().invoke(app, ["serve", *args])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], ["run", str(SHIPPED)]),
        ([str(SHIPPED)], ["run", str(SHIPPED)]),
        (["--ray-address", "auto"], ["run", "--address", "auto", str(SHIPPED)]),
    ],
)
def test_serves_command_is_run_on_the_file_or_the_bundled_one(
    args: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = FakeServe()
    result = run(monkeypatch, serve, *args)
    assert (result.exit_code, serve.told) == (0, [expected])
    assert serve.attended == [(["serve", *expected], expected[-1])]


def test_what_is_run_is_the_serve_command_of_ray() -> None:
    [command] = module.entry_points(group="console_scripts", name=module.PROGRAM)
    assert "run" in command.load().commands


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.yaml", None, "does not exist"),
        (".", None, "is a folder without mixture.yaml or config.json"),
        ("a.yaml", "a: b: c", "is not YAML"),
        ("a.yaml", "", "needs a list 'applications'"),
        ("a.yaml", "applications: [{name: a, import_path: b:c}]", "must be router.app:build"),
    ],
)
def test_a_wrong_path_or_file_is_a_line_and_starts_nothing(
    name: str, content: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, serve = tmp_path / name, FakeServe()
    if content is not None:
        path.write_text(content)
    result = run(monkeypatch, serve, str(path))
    [line] = result.stderr.splitlines()
    assert line.startswith(f"expertmesh: {path}")
    assert reason in line
    assert (result.exit_code, serve.told) == (2, [])


@pytest.mark.parametrize("marker", ["mixture.yaml", "config.json"])
def test_a_models_folder_is_served_under_its_name_as_the_bundled_model_is(
    marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "houses"
    model.mkdir()
    (model / marker).touch()
    monkeypatch.chdir(tmp_path)
    serve = FakeServe()
    documents = []
    monkeypatch.setattr(serve, "attend", lambda _line, file: documents.append(read_document(file)))
    result = run(monkeypatch, serve, "houses")
    assert (result.exit_code, result.output) == (0, "")
    [document] = documents
    expected = read_document(SHIPPED)
    expected["applications"][0]["args"]["models"] = [{"id": "houses", "path": str(model)}]
    assert document == expected
    [[_, file]] = serve.told
    assert Path(file).name == "houses.yaml"
    assert not Path(file).exists()


def test_what_serve_finds_wrong_with_its_part_of_the_file_is_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="port") as caught:
        ServeDeploySchema.model_validate({"applications": [], "grpc_options": {"port": "many"}})
    result = run(monkeypatch, FakeServe(caught.value), str(SHIPPED))
    [line] = result.stderr.splitlines()
    assert line.startswith(f"expertmesh: {SHIPPED}: grpc_options.port: ")
    assert line.endswith("(given: 'many')")
    assert result.exit_code == 2


def test_ctrl_c_before_serve_minds_it_is_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, FakeServe(click.Abort()), str(SHIPPED))
    assert (result.exit_code, result.output) == (130, "")
