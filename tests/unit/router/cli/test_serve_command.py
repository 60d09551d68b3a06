"""``expertmesh serve`` and ``deploy``: what they refuse, and what they hand to Serve's commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from click.testing import Result
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

import deploy
from router.cli import serve as module
from router.cli.app import app
from router.config.deployment import read_document
from router.security.token_file import LOOPBACK
from router.serve.options import completed

SHIPPED = Path(deploy.__file__).parent / "cluster.yaml"


class FakeServe:
    """Stands in for Serve's command, for Ray and for the checks; keeps what each was given."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.states: list[dict[str, str]] = []
        """The state of the application, as Serve's command tells it time after time."""
        self.steps: list[str] = []
        self.folder = Path("none")
        self.told: list[list[str]] = []
        """The words of Serve's command, without the file that comes last."""
        self.files: list[Path] = []
        self.documents: list[dict[str, Any]] = []
        """What these files had while the command ran."""
        self.checked: list[tuple[Path, dict[str, Any], str | None]] = []
        self.joined: list[tuple[str | None, str]] = []
        self.modes: list[str | None] = []
        """Ray's mode of the token while it started."""

    def __call__(self, *args: object, command: str = "serve") -> Result:
        """Run a command of ours."""
        try:
            return CliRunner().invoke(app, [command, *map(str, args)])
        finally:
            rmtree(self.folder, ignore_errors=True)  # as the parent does

    def supervised(self, say: Callable[[str], None], folder: Path) -> Callable[[], None]:
        self.folder = folder
        return lambda: self.steps.append("told")

    def load(self) -> FakeServe:
        return self

    def main(self, args: list[str], **options: Any) -> None:
        assert options == {"prog_name": "serve", "standalone_mode": False}
        if args[0] == "status":
            state = self.states.pop(0)
            print(yaml.safe_dump({"applications": {"expertmesh": state}}))
            return
        self.steps.append("serve")
        *words, file = args
        self.told.append(words)
        self.files.append(Path(file))
        self.documents.append(read_document(Path(file)))
        if self.error is not None:
            raise self.error

    def check(self, file: Path, document: dict[str, Any], address: str | None) -> None:
        self.steps.append("check")
        self.checked.append((file, document, address))

    def init(self, address: str | None, namespace: str) -> SimpleNamespace:
        self.steps.append("ray")
        self.modes.append(os.environ.get("RAY_AUTH_MODE"))
        self.joined.append((address, namespace))
        info = {"gcs_address": "127.0.0.1:6380"}
        return SimpleNamespace(dashboard_url="127.0.0.1:8266", address_info=info)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    """Serve's command and Ray, in their places."""
    fake = FakeServe()

    def entry_points(**wanted: str) -> list[FakeServe]:
        assert wanted == {"group": "console_scripts", "name": "serve"}
        return [fake]

    startup = "router.ops.startup"
    steps = {name: partial(fake.steps.append, name) for name in ("handlers", "progress")}
    handlers = SimpleNamespace(install=steps["handlers"])
    # A Ray of this machine, also one that was killed, would be joined.
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(module, "entry_points", entry_points)
    monkeypatch.setattr(f"{startup}.preflight.check_start", fake.check)
    monkeypatch.setattr(f"{startup}.preflight.check_deploy", fake.check)
    monkeypatch.setattr(f"{startup}.preflight.tell_progress", lambda *_: steps["progress"]())
    monkeypatch.setattr(f"{startup}.termination.Termination", lambda say: handlers)
    monkeypatch.setattr(f"{startup}.supervisor.supervised", fake.supervised)
    monkeypatch.setattr("ray.init", fake.init)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", *LOOPBACK):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(f"{startup}.ray_token.user_has_token", lambda variables: True)
    return fake


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A file without Serve's part."""
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump({"applications": read_document(SHIPPED)["applications"]}))
    return file


@pytest.mark.parametrize("is_short", [False, True])
def test_a_file_or_the_bundled_one_is_served_completed_on_a_ray_of_ones_own(
    is_short: bool, short: Path, serve: FakeServe
) -> None:
    file = short if is_short else SHIPPED
    result = serve(*([short] if is_short else []))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith(
        "export RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "
        "RAY_DASHBOARD_ADDRESS=http://127.0.0.1:8266 "
        "RAY_ADDRESS=127.0.0.1:6380\n"
    )
    whole = completed(read_document(file))
    assert serve.checked == [(file, whole, None)]
    assert serve.joined == [(None, "serve")]
    assert (serve.told, serve.documents) == ([["run", "--address", "auto"]], [whole])
    assert serve.files == [serve.folder / file.name]
    assert serve.steps == ["check", "progress", "ray", "handlers", "told", "serve"]
    assert serve.modes == ["token"]


def test_a_running_cluster_is_joined_and_keeps_its_own_token(serve: FakeServe) -> None:
    result = serve("--ray-address", "head:6379")
    assert (result.exit_code, result.output) == (0, "")
    assert [address for _, _, address in serve.checked] == ["head:6379"]
    assert serve.joined == [("head:6379", "serve")]
    assert serve.modes == [None]


@pytest.mark.parametrize("address", [None, "http://d:1"])
def test_deploy_sends_the_completed_file_and_starts_nothing(
    address: str | None, short: Path, serve: FakeServe
) -> None:
    options = [] if address is None else ["--address", address]
    result = serve(short, *options, command="deploy")
    assert (result.exit_code, result.output) == (0, f"expertmesh: sent {short}\n")
    whole = completed(read_document(short))
    assert serve.steps == ["check", "serve"]
    assert serve.checked == [(short, whole, address)]
    assert (serve.told, serve.documents) == ([["deploy", *options]], [whole])
    [written] = serve.files
    assert written.name == short.name
    assert not written.exists()


@pytest.mark.parametrize(
    ("end", "exit_code", "line"),
    [
        ({"status": "RUNNING"}, 0, "expertmesh: serving {file}"),
        (
            {"status": "DEPLOY_FAILED", "message": "no\n folder"},
            1,
            "expertmesh: {file}: expertmesh: no folder",
        ),
    ],
)
def test_deploy_waits_for_the_end_of_the_deployment(
    end: dict[str, str],
    exit_code: int,
    line: str,
    short: Path,
    serve: FakeServe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WAIT_PERIOD_S", 0.0)
    serve.states = [{"status": "DEPLOYING"}, {"status": "UNHEALTHY"}, end]
    result = serve(short, "--wait", command="deploy")
    assert (result.exit_code, result.output) == (exit_code, line.format(file=short) + "\n")
    assert serve.states == []


def test_a_deploy_that_serve_refuses_is_a_line(short: Path, serve: FakeServe) -> None:
    serve.error = ConnectionError("nothing answers\nat all")
    result = serve(short, command="deploy")
    wanted = f"expertmesh: {short}: `serve deploy` failed: nothing answers at all\n"
    assert (result.exit_code, result.output) == (1, wanted)


def test_ports_are_three_in_a_row_from_the_given_one(short: Path, serve: FakeServe) -> None:
    assert serve(short, "--port", "8100").exit_code == 0
    [document] = serve.documents
    listen = document["applications"][0]["args"]["gateway"]["listen"]
    assert listen == {"http_port": 8100, "grpc_port": 8101, "admin_port": 8102}


def test_a_model_of_the_hub_is_served_under_its_name(serve: FakeServe) -> None:
    assert serve("acme/small@main").exit_code == 0
    [document] = serve.documents
    models = document["applications"][0]["args"]["models"]
    assert models == [{"id": "small", "path": "acme/small@main"}]


@pytest.mark.parametrize(
    ("command", "name", "content", "reason"),
    [
        ("serve", "missing.yaml", None, "does not exist"),
        ("serve", ".", None, "is a folder without mixture.yaml or config.json"),
        ("serve", "a.yaml", "a: b: c", "is not YAML"),
        ("serve", "a.yaml", "", "needs a list 'applications'"),
        ("serve", "a.yaml", "applications: [{import_path: b:c}]", "must be router.app:build"),
        ("deploy", "a.yaml", None, "cannot be read"),
        ("deploy", "a.yaml", "a: b: c", "is not YAML"),
    ],
)
def test_a_wrong_path_or_file_is_a_line_and_starts_nothing(
    command: str, name: str, content: str | None, reason: str, tmp_path: Path, serve: FakeServe
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    result = serve(path, command=command)
    [line] = result.stderr.splitlines()
    assert line.startswith(f"expertmesh: {path}")
    assert reason in line
    assert (result.exit_code, serve.steps) == (2, [])


@pytest.mark.parametrize("marker", ["mixture.yaml", "config.json"])
def test_a_models_folder_is_served_under_its_name_as_the_bundled_model_is(
    marker: str, tmp_path: Path, serve: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "houses"
    model.mkdir()
    (model / marker).touch()
    monkeypatch.chdir(tmp_path)
    result = serve("houses")
    assert (result.exit_code, result.stderr) == (0, "")
    expected = read_document(SHIPPED)
    expected["applications"][0]["args"]["models"] = [{"id": "houses", "path": str(model)}]
    assert serve.documents == [expected]
    assert serve.files == [serve.folder / "houses.yaml"]


def test_what_serve_finds_wrong_with_its_part_of_the_file_is_a_line(serve: FakeServe) -> None:
    wrong = {"applications": [], "logging_config": {"enable_access_log": "many"}}
    with pytest.raises(ValueError, match="enable_access_log") as caught:
        ServeDeploySchema.model_validate(wrong)
    serve.error = caught.value
    result = serve(SHIPPED)
    [line] = result.stderr.splitlines()
    assert line.startswith(f"expertmesh: {SHIPPED}: logging_config.enable_access_log: ")
    assert line.endswith("(given: 'many')")
    assert result.exit_code == 2


def test_ctrl_c_before_serve_minds_it_is_no_stack(serve: FakeServe) -> None:
    serve.error = click.Abort()
    result = serve(SHIPPED)
    assert (result.exit_code, result.stderr) == (130, "")


def test_a_line_is_printed_past_pythons_buffers_and_may_have_no_reader(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module.write_line("expertmesh: SIGTERM: ending")
    assert capfd.readouterr().out == "expertmesh: SIGTERM: ending\n"

    def no_reader(file: int, data: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(module.os, "write", no_reader)
    module.write_line("nobody reads it")
