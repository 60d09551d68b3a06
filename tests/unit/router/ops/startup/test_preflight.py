"""What ends a ``serve run`` or ``serve deploy`` before it begins, and what it tells."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray.serve.scripts import cli as serve_commands

import deploy
from benchmarks.shipped import free_ports, shipped_document
from cluster.memory import Memory
from experts.checkpoint.hash_cache import BESIDE
from router.ops import startup
from router.ops.doctor import probe
from router.ops.doctor.devices import Devices, Gpu
from router.ops.doctor.running_ray import RunningRay, Target, look_at
from router.ops.startup import preflight
from router.ops.startup.preflight import attend, deployment_file, given_address
from router.security.keys import Role
from router.security.keys_file import add_key
from router.security.token_file import LOOPBACK
from tests.checkpoints import save_mixtral
from tests.client_tls import Pair
from tests.unit.certificates import new_authority

DEPLOY = Path(deploy.__file__).parent
JOINING = (["run", "--address", "head:6379"], ["deploy"])


def write(file: Path, document: object) -> Path:
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The shipped file, on ports that are free."""
    return write(tmp_path / "cluster.yaml", shipped_document(*free_ports(2)))


@pytest.fixture(autouse=True)
def own_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No Ray of this machine counts; returns the folder that a Ray would have."""
    temp = tmp_path / "t"
    temp.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    of_nodes(monkeypatch, 1, has_token=True)
    monkeypatch.setattr(preflight, "token_variable", dict)
    monkeypatch.setattr(preflight, "tell_progress", lambda document, starts_ray: None)
    monkeypatch.setenv("RAY_TMPDIR", str(temp))
    # Where pytest's own folders have long names, sockets would not fit in them.
    monkeypatch.setattr("router.ops.doctor.doctor.MAX_SOCKET_PATH", 500)
    return temp


class Serve:
    """Serve's own command, as far as our part of it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> tuple[str, str]:
        """Return what a command prints that is not refused."""
        attend(["serve", *map(str, words)])
        out, err = self.capsys.readouterr()
        return out, err

    def refused(self, *words: object) -> str:
        """Return the one line with which a command is refused."""
        with pytest.raises(SystemExit) as caught:
            self(*words)
        assert caught.value.code == 2
        out, err = self.capsys.readouterr()
        assert out == ""
        [line] = err.splitlines()
        return str(line)


@pytest.fixture
def serve(capsys: pytest.CaptureFixture[str]) -> Serve:
    return Serve(capsys)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["/bin/serve", "run", "FILE"], True),
        (["serve", "deploy", "FILE"], True),
        (["serve", "run", "--address", "local", "FILE"], True),
        (["serve", "run", "FILE", "--address", "local"], True),
        (["serve", "run", "absent.yaml"], False),
        (["serve", "run", "router.app:build"], False),
        (["serve", "run"], False),
        (["serve", "status", "FILE"], False),
        (["serve"], False),
        ([], False),
        (["pytest", "run", "FILE"], False),
        (["server", "run", "FILE"], False),
        (["expertmesh", "check", "FILE"], False),
    ],
)
def test_the_file_of_a_serve_command_is_found_and_no_others(
    tmp_path: Path, argv: list[str], found: bool
) -> None:
    file = tmp_path / "a.yaml"
    file.touch()
    words = [str(file) if word == "FILE" else word for word in argv]
    assert deployment_file(words) == (file if found else None)


@pytest.mark.parametrize(
    ("words", "done"),
    [
        (["run"], ["progress of our Ray"]),
        (["run", "-a", "local"], ["progress of our Ray"]),
        (["run", "--address", "head:6379"], ["progress of a Ray"]),
        (["deploy"], []),
        (["deploy", "-a", "http://d:1"], []),
    ],
)
def test_a_good_file_lets_the_serve_command_go_on(
    file: Path, words: list[str], done: list[str], monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    found: list[str] = []

    def tell_progress(document: dict[str, Any], starts_ray: bool) -> None:
        assert document == yaml.safe_load(file.read_text(encoding="utf-8"))
        found.append(f"progress of {'our' if starts_ray else 'a'} Ray")

    monkeypatch.setattr(preflight, "tell_progress", tell_progress)
    assert serve(*words, file) == ("", "")
    assert found == done


@pytest.mark.parametrize(("words", "is_told"), [([], True), (["-a", "head:6379"], False)])
def test_a_start_of_ray_tells_other_shells_of_its_token(
    file: Path, words: list[str], is_told: bool, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(preflight, "token_variable", lambda: {"RAY_AUTH_MODE": "token"})
    line, _ = serve("run", *words, file)
    assert line.endswith(" in another shell: export RAY_AUTH_MODE=token\n") if is_told else not line


@pytest.mark.parametrize("starts_ray", [True, False])
def test_only_the_start_of_a_ray_of_ones_own_is_explained_when_slow(
    starts_ray: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[object] = []

    def announce(document: object, say: Callable[[str], None], *rest: object) -> list[str]:
        told.append(document)
        say("ready")
        return ["start"]

    monkeypatch.undo()  # the fixture has another function in its place
    monkeypatch.setattr(preflight, "announce", announce)
    monkeypatch.setattr(preflight, "explain_slow_start", lambda say, starts: told.append(starts))
    preflight.tell_progress({}, starts_ray)
    assert told == ([{}, ["start"]] if starts_ray else [{}])
    assert capsys.readouterr().out == "ready\n"


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ([], None),
        (["--address", "a:1"], "a:1"),
        (["--address=a:1"], "a:1"),
        (["-a", "local"], "local"),
        (["-alocal"], "local"),
        (["--app-dir", "x", "-a", "b:2"], "b:2"),
        (["--address"], None),
    ],
)
def test_the_address_of_a_command_line_is_found(words: list[str], address: str | None) -> None:
    assert given_address(["serve", "run", "f.yaml", *words]) == address


def test_a_taken_port_is_named_with_its_key_and_who_has_it(tmp_path: Path, serve: Serve) -> None:
    http_port, grpc_port = free_ports(2)
    file = write(tmp_path / "busy.yaml", shipped_document(http_port, grpc_port))
    with socket.create_server(("127.0.0.1", grpc_port)):
        line = serve.refused("run", file)
    assert line.startswith(f"expertmesh: port {grpc_port}: for gRPC: it is taken")
    assert f"(pid {os.getpid()}). End that process, or set gateway.listen.grpc_port to an" in line


def test_an_address_file_of_a_ray_that_is_gone_ends_the_command_at_once(
    file: Path, own_ray: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "look_at", look_at)
    (own_ray / "ray").mkdir()
    named = own_ray / "ray" / "ray_current_cluster"
    [nobody] = free_ports(1)
    named.write_text(f"127.0.0.1:{nobody}")
    line = serve.refused("run", file)
    assert f"127.0.0.1:{nobody} (named by {named}) does not answer (Connection refused)" in line
    assert "`ray stop`" in line
    serve("run", "-a", "local", file)  # which does as it was told


def test_a_ray_of_another_version_ends_the_command(
    file: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    def old(target: Target) -> RunningRay:
        return RunningRay(target, "is Ray 2.9.0 on Python 3.9.1; here is another")

    monkeypatch.setattr(preflight, "look_at", old)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    line = serve.refused("run", file)
    assert "10.0.0.1:6379 (named by RAY_ADDRESS) is Ray 2.9.0 on Python 3.9.1" in line
    assert "start it again from this virtual environment" in line


def test_too_little_memory_or_a_full_disk_ends_the_command(
    file: Path, own_ray: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(probe, "memory", lambda: Memory(2 * 10**9, 10**9))
        line = serve.refused("run", file)
    assert line.startswith("expertmesh: memory: 1.00 GB of 2.00 GB free; about 2.05 GB needed")

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("router.ops.doctor.machine.tempfile.TemporaryFile", full)
    line = serve.refused("run", file)
    assert f"{own_ray / 'ray'} is full. Free some space, or set RAY_TMPDIR" in line


@pytest.fixture
def gpu_file(tmp_path: Path) -> str:
    """The shipped file for GPUs, on loopback and on ports that are free."""
    document = shipped_document(*free_ports(2), file=DEPLOY / "gpu.yaml")
    args = document["applications"][0]["args"]
    del args["security"], args["gateway"]["listen"]["host"]
    return str(write(tmp_path / "gpu.yaml", document))


def on_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    found = Devices(2, gpus, "2.13.0")
    monkeypatch.setattr(probe, "find_devices", lambda: found)


def test_no_gpu_or_one_without_room_for_weights_and_caches_ends_the_command(
    gpu_file: str, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    on_gpus(monkeypatch)
    line = serve.refused("run", gpu_file)
    assert line.startswith("expertmesh: devices: 2 CPUs, no GPU; torch 2.13.0 finds no GPU: router")
    on_gpus(monkeypatch, Gpu("tiny", 100_000_000))
    assert "GPU 0 (tiny) of 100 MB lacks " in serve.refused("run", gpu_file)
    on_gpus(monkeypatch, Gpu("small", 500_000_000))
    [warning] = serve("run", gpu_file)[1].splitlines()
    assert warning.startswith("expertmesh: devices: 2 CPUs, 1 GPU (small); GPU 0 (small) of 500 MB")
    on_gpus(monkeypatch, Gpu("enough", 2_000_000_000))
    assert serve("run", gpu_file) == ("", "")


def test_a_cluster_that_is_joined_may_get_its_gpus_later(
    gpu_file: str, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    on_gpus(monkeypatch)
    for command in JOINING:
        assert serve(*command, gpu_file) == ("", "")


def test_a_model_that_this_machine_lacks_is_the_clusters_to_find_if_one_is_joined(
    tmp_path: Path, serve: Serve
) -> None:
    document = shipped_document(*free_ports(2))
    document["applications"][0]["args"]["models"][0]["path"] = str(tmp_path / "nowhere")
    file = write(tmp_path / "nowhere.yaml", document)
    for words in (["run", "--address=auto"], ["deploy"]):
        [line] = serve(*words, file)[1].splitlines()
        assert line.startswith("expertmesh: ")
        assert line.endswith("nowhere: no such folder; the cluster looks for it on its nodes")
    for options in ([], ["-a", "local"]):
        line = serve.refused("run", file, *options)
        assert "nowhere: no such folder" in line
        assert "serve run --address=auto" in line


def test_of_a_cluster_that_is_there_only_whether_it_answers_is_asked(
    file: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    asked: list[Target] = []

    def fine(target: Target) -> RunningRay:
        asked.append(target)
        return RunningRay(target, "", has_token=True)

    monkeypatch.setattr(preflight, "look_at", fine)
    monkeypatch.setattr(probe, "memory", lambda: Memory(1, 1))
    assert serve("run", file, "--address=ray://head:10001") == ("", "")
    assert asked == [Target("ray://head:10001", "--address")]


@pytest.fixture
def too_long(tmp_path: Path) -> tuple[Path, str]:
    """A file that is wrong, and the line that says so."""
    document = yaml.safe_load((DEPLOY / "cluster.yaml").read_text(encoding="utf-8"))
    document["applications"][0]["args"]["models"][0]["max_model_len"] = 1025
    file = write(tmp_path / "bad.yaml", document)
    where = "applications.expertmesh.args.models[0].max_model_len"
    return file, f"{file}: {where}: must be at most the model's own 1024 (given: 1025)"


def test_the_real_command_refuses_a_bad_file_with_one_line_and_starts_no_ray(
    too_long: tuple[Path, str], own_ray: Path
) -> None:
    file, told = too_long
    serve = Path(sys.executable).with_name("serve")
    result = subprocess.run(
        [str(serve), "run", file, "--address", "local"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        check=False,
    )
    assert result.returncode == 2
    lines = (result.stdout + result.stderr).splitlines()
    assert [line for line in lines if line.startswith("expertmesh:")] == [f"expertmesh: {told}"]
    assert not any("Traceback" in line or "Started a local Ray" in line for line in lines)
    # Whatever Ray starts puts its session there first.
    assert list(own_ray.iterdir()) == []


def test_serves_own_deploy_refuses_a_bad_file_with_one_line(
    too_long: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command imports the module anew, as in a process of its own, which takes seconds."""
    file, told = too_long
    words = ["deploy", str(file), "--address", "http://127.0.0.1:9"]  # nobody answers there
    monkeypatch.setattr(sys, "argv", ["serve", *words])
    monkeypatch.setattr(startup, "preflight", preflight)  # the import sets it
    monkeypatch.delitem(sys.modules, preflight.__name__)
    result = CliRunner().invoke(serve_commands, words)
    lines = [line for line in result.output.splitlines() if "scripts.py" not in line]  # Serve's own
    assert (result.exit_code, lines) == (2, [f"expertmesh: {told}"])


@pytest.fixture
def own_model(tmp_path: Path) -> tuple[Path, Path]:
    """A deployment file, and the folder of its model."""
    folder = tmp_path / "model"
    save_mixtral(folder)
    document = shipped_document(*free_ports(2))
    document["applications"][0]["args"]["models"] = [{"id": "m", "path": str(folder)}]
    return write(tmp_path / "own.yaml", document), folder


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_start_hashes_checkpoints_before_it_starts_anything(
    own_model: tuple[Path, Path], command: str, serve: Serve
) -> None:
    file, folder = own_model
    serve(command, file)
    # A deploy does not know whether the cluster builds the application on this machine.
    assert (folder / BESIDE).exists() == (command == "run")


def test_a_checkpoint_that_changes_while_a_start_hashes_it_ends_the_start(
    own_model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    file, folder = own_model
    checks_of_a_start = preflight.checks_of_a_start

    def changed(*arguments: Any) -> Any:
        (folder / "model.safetensors").touch()
        return checks_of_a_start(*arguments)

    monkeypatch.setattr(preflight, "checks_of_a_start", changed)
    line = serve.refused("run", file)
    assert line == f"expertmesh: {folder}/model.safetensors: has changed since it was opened"


def of_nodes(monkeypatch: pytest.MonkeyPatch, num_nodes: int, has_token: bool | None) -> None:
    """A cluster of so many nodes, for ``serve run`` and for ``serve deploy``."""
    found = partial(RunningRay, reason="", num_nodes=num_nodes, has_token=has_token)
    monkeypatch.setattr(preflight, "look_at", found)
    monkeypatch.setattr(preflight, "dashboard_has_token", lambda url: has_token)


@pytest.mark.parametrize("command", JOINING)
def test_a_running_ray_without_a_token_ends_the_command(
    file: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    of_nodes(monkeypatch, 1, has_token=True)
    assert serve(*command, file) == ("", "")
    of_nodes(monkeypatch, 1, has_token=None)
    [warning] = serve(*command, file)[1].splitlines()
    assert warning.startswith("expertmesh: token: it is not known")
    of_nodes(monkeypatch, 1, has_token=False)
    line = serve.refused(*command, file)
    assert line.startswith(
        "expertmesh: token: Ray asks nobody for one: whoever reaches this machine"
    )
    assert "RAY_AUTH_MODE=token" in line


@pytest.mark.parametrize(
    ("words", "variable", "asked"),
    [
        ([], None, "http://localhost:8265"),
        ([], "http://d:1", "http://d:1"),
        (["-a", "http://a:2"], "http://d:1", "http://a:2"),
    ],
)
def test_a_deploy_asks_the_dashboard_that_it_sends_its_file_to(
    file: Path,
    words: list[str],
    variable: str | None,
    asked: str,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    urls: list[str] = []
    monkeypatch.setattr(preflight, "dashboard_has_token", lambda url: (urls.append(url), True)[1])
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", variable)
    serve("deploy", file, *words)
    assert urls == [asked]


def test_several_nodes_without_encryption_are_warned_of(
    file: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    of_nodes(monkeypatch, 2, has_token=True)
    [warning] = serve(*JOINING[0], file)[1].splitlines()
    assert warning.startswith("expertmesh: encryption: 2 nodes send each other prompts")


@pytest.mark.parametrize("words", [[], ["--address", "head:6379"]])
def test_tls_of_streams_without_that_of_ray_ends_the_command(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    of_nodes(monkeypatch, 1, has_token=True)
    files = new_authority(tmp_path / "tls").files
    document = shipped_document(*free_ports(2))
    document["applications"][0]["args"]["experts"] = {"tls": asdict(files)}
    command = ["run", str(write(tmp_path / "tls.yaml", document)), *words]
    line = serve.refused(*command)
    assert line.startswith("expertmesh: encryption: experts.tls needs RAY_USE_TLS=1 in the ")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert serve(*command) == ("", "")


def test_a_ray_of_its_own_without_a_token_ends_the_command_on_loopback_too(
    file: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setenv(*next(iter(LOOPBACK.items())))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert serve.refused("run", file).startswith("expertmesh: token: Ray asks nobody for one")
    monkeypatch.delenv("RAY_AUTH_MODE")  # the start sets it
    assert serve("run", file) == ("", "")


def test_a_token_that_others_may_read_ends_the_command_and_one_is_made_private(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    before = os.umask(0)
    try:
        assert serve("run", file) == ("", "")
    finally:
        os.umask(before)
    assert (token.parent.stat().st_mode & 0o777, token.stat().st_mode & 0o777) == (0o700, 0o600)
    made = token.read_text()
    assert serve("run", file) == ("", "")
    assert token.read_text() == made
    for mode in (0o640, 0o644):
        token.chmod(mode)
        line = serve.refused("run", file)
        assert line.startswith(f"expertmesh: token: the file of Ray's token, {token}, may be used")
        assert f"chmod 600 {token}" in line


def secured(file: Path, security: object, **listen: Any) -> Path:
    """The file with a section of security, and with other keys of ``gateway.listen``."""
    document = yaml.safe_load(file.read_text())
    args = document["applications"][0]["args"]
    if security is not None:
        args["security"] = security
    args["gateway"]["listen"] |= listen
    return write(file, document)


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_host_that_others_reach_needs_keys_or_an_open_word(
    file: Path, tmp_path: Path, serve: Serve, command: str
) -> None:
    secured(file, None, admin_host="0.0.0.0")
    line = serve.refused(command, file)
    told = "gateway.listen.admin_host: must be an address of this machine if there are no keys; "
    assert f"{told}got '0.0.0.0'" in line
    secured(file, "open")
    serve(command, file)
    keys = tmp_path / "keys.yaml"
    add_key(keys, "alice", [Role.INFERENCE])
    secured(file, {"keys_file": str(keys)})
    serve(command, file)


def test_keys_and_certificates_must_be_usable_where_gateways_start(
    file: Path, tmp_path: Path, serve: Serve
) -> None:
    keys, pair = tmp_path / "keys.yaml", Pair(tmp_path / "tls")
    secured(file, {"keys_file": str(keys)})
    assert f"{keys}: cannot be read" in serve.refused("run", file)
    serve("deploy", file)  # its gateways are elsewhere
    add_key(keys, "alice", [Role.INFERENCE])
    secured(file, None, tls=pair.listen())
    serve("run", file)
    keys.chmod(0o644)
    assert "may be used by other users" in serve.refused("run", file)
    keys.chmod(0o600)
    pair.replace(ends_at=datetime.now(UTC) - timedelta(days=1))
    told = f"gateway.listen.tls.certificate: {pair.server} is refused by TLS: certificate has"
    assert told in serve.refused("run", file)
    serve("deploy", file)


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_what_serves_proxies_would_need_ends_the_command(
    file: Path, command: str, serve: Serve
) -> None:
    write(file, yaml.safe_load(file.read_text()) | {"http_options": {"port": 81}})
    line = serve.refused(command, file)
    assert line.startswith(f"expertmesh: {file}: http_options: is of Serve's proxies, and the ")


def test_two_applications_need_their_own_ports(file: Path, serve: Serve) -> None:
    document = yaml.safe_load(file.read_text())
    [first] = document["applications"]
    other = yaml.safe_load(yaml.safe_dump(first)) | {"name": "other"}
    listen = other["args"]["gateway"]["listen"]
    shared = dict(listen)
    listen |= dict(zip(listen, free_ports(3, apart_from=listen.values()), strict=True))
    document["applications"].append(other)
    serve("run", write(file, document))
    own = dict(listen)
    for key in ("http_port", "grpc_port", "admin_port"):
        listen |= own | {key: shared[key]}
        line = serve.refused("run", write(file, document))
        assert line == (
            f"expertmesh: {file}: gateway.listen.{key}: must be another port for each application; "
            f"got {shared[key]} for expertmesh and other"
        )
