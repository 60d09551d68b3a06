"""What is found of a machine: each probe against the machine itself, or a made-up part of it."""

from __future__ import annotations

import errno
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.shipped import DEPLOYED, free_ports, shipped_document
from cluster import native as built
from router.ops.doctor import machine, probe, running_ray
from router.ops.doctor.check import Check
from router.ops.doctor.devices import Gpu
from router.ops.doctor.ports import Port, ports_of, taken_ports
from router.ops.doctor.running_ray import Target, look_at, target_of
from router.security.token_file import user_has_token

HERE = {"RAY_TMPDIR": "/nowhere"}
Examine = Callable[..., dict[str, Check]]


def listening(*listens: dict[str, Any]) -> dict[str, Any]:
    """Return a deployment file with an application for each section of ``gateway.listen``."""
    return {
        "applications": [
            {"import_path": "router.app:build", "args": {"gateway": {"listen": listen}}}
            for listen in listens
        ]
    }


def test_the_shipped_file_opens_the_ports_that_the_readme_tells() -> None:
    ports = ports_of(yaml.safe_load(DEPLOYED.read_text(encoding="utf-8")))
    assert [(port.number, port.purpose, port.key) for port in ports] == [
        (8000, "HTTP", "gateway.listen.http_port"),
        (9000, "gRPC", "gateway.listen.grpc_port"),
        (9001, "gRPC for operators", "gateway.listen.admin_port"),
    ]
    assert {port.host for port in ports} == {"127.0.0.1"}
    assert [port.number for port in ports_of(shipped_document(1111, 2222))] == [1111, 2222, 2223]


def test_each_application_opens_its_ports_on_its_hosts() -> None:
    assert ports_of({}) == []
    assert ports_of({"applications": [{"import_path": "other:app"}]}) == []
    for args in ({}, None, {"gateway": None}, {"gateway": {}}):
        application = {"import_path": "router.app:build", "args": args}
        found = ports_of({"applications": [application]})
        assert [one.number for one in found] == [8000, 9000, 9001]
    several = listening(
        {"host": "0.0.0.0", "http_port": 1, "grpc_port": 2, "health_port": 4},
        {"admin_host": "::1", "admin_port": 77},
    )
    assert [(port.host, port.number) for port in ports_of(several)] == [
        *(("0.0.0.0", 1), ("0.0.0.0", 2), ("127.0.0.1", 9001), ("127.0.0.1", 4)),
        *(("127.0.0.1", 8000), ("127.0.0.1", 9000), ("::1", 77)),
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_is_taken_while_somebody_listens(host: str) -> None:
    [number] = free_ports(1)
    port = Port(number, host, "HTTP", "key")
    assert taken_ports([port]) == []
    with socket.create_server(("127.0.0.1", number)):
        [taken] = taken_ports([port])
        assert taken.port == port
        name = psutil.Process().name()
        assert taken.reason == f"it is taken by {name} (pid {os.getpid()})"
    assert taken_ports([port]) == []


def test_a_port_of_a_connection_that_is_closing_is_free() -> None:
    [number] = free_ports(1)
    with socket.create_server(("127.0.0.1", number)) as server:
        client = socket.create_connection(("127.0.0.1", number))
        connection, _ = server.accept()
        connection.close()  # this side closes first and is left to wait
        client.close()
    assert taken_ports([Port(number, "127.0.0.1", "HTTP", "key")]) == []


def test_what_cannot_be_opened_for_other_reasons_says_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [number] = free_ports(1)
    elsewhere = Port(number, "192.0.2.1", "HTTP", "key")
    nameless = Port(number, "nowhere.invalid", "HTTP", "key")
    fine = Port(number, "127.0.0.1", "HTTP", "key")
    first, second = taken_ports([elsewhere, fine, nameless])
    assert (first.port, second.port) == (elsewhere, nameless)
    assert "192.0.2.1 is not an address of this machine" in first.reason
    assert second.reason.startswith("nowhere.invalid has no address (")

    class Denied(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("router.gateway.listen.claim.socket.socket", Denied)
    [taken] = taken_ports([Port(80, "127.0.0.1", "HTTP", "key")])
    assert taken.reason == "this user may not open it"


def test_a_folder_that_does_not_exist_yet_is_tried_where_it_would_be(tmp_path: Path) -> None:
    disk = machine.writable_folder(tmp_path / "a" / "b")
    assert (disk.folder, disk.reason) == (tmp_path / "a" / "b", "")
    assert 0 < disk.free_bytes <= disk.total_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "is full"), (errno.EACCES, "cannot be written to")]
)
def test_a_disk_that_takes_no_file_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def fails(**_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("router.ops.doctor.machine.tempfile.TemporaryFile", fails)
    assert machine.writable_folder(tmp_path).reason.startswith(words)


@pytest.mark.parametrize(
    ("given", "variables", "target"),
    [
        (None, {}, None),
        ("local", {"RAY_ADDRESS": "a:1"}, None),
        ("b:2", {"RAY_ADDRESS": "a:1"}, Target("b:2", "--address")),
        (None, {"RAY_ADDRESS": "a:1"}, Target("a:1", "RAY_ADDRESS")),
        ("auto", {"RAY_ADDRESS": "a:1"}, Target("a:1", "RAY_ADDRESS")),
        (None, {"RAY_ADDRESS": "local"}, None),
        ("auto", {}, Target("", "--address")),
        (None, {"RAY_ADDRESS": "auto"}, Target("", "RAY_ADDRESS")),
    ],
)
def test_the_ray_that_a_command_joins_is_found_as_ray_finds_it(
    given: str | None, variables: dict[str, str], target: Target | None
) -> None:
    assert target_of(given, HERE | variables) == target


def test_a_ray_that_was_started_on_this_machine_is_joined(tmp_path: Path) -> None:
    variables = {"RAY_TMPDIR": str(tmp_path)}
    file = running_ray.temp_folder(variables) / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text("10.0.0.1:6379\n")
    assert target_of(None, variables) == Target("10.0.0.1:6379", str(file))
    assert target_of("local", variables) is None
    file.write_text("")
    assert target_of(None, variables) is None


def test_the_folder_is_the_one_that_ray_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    for variables in ({"RAY_TMPDIR": "/x"}, {"TMPDIR": "/y"}, {}):
        for name in ("RAY_TMPDIR", "TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(running_ray.temp_folder(variables)) == get_default_ray_temp_dir()


def test_nobody_and_nonsense_do_not_answer() -> None:
    [nobody] = free_ports(1)
    assert look_at(Target(f"127.0.0.1:{nobody}", "F")).reason.startswith("does not answer (")
    assert look_at(Target("nonsense", "F")).reason == "is no address of the form host:port"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "answers nothing within 1 s"),
        (
            "raise RuntimeError('rpc error')",
            "does not answer as a Ray does (RuntimeError: rpc error)",
        ),
        ("print('[1')", "does not answer as a Ray does"),
        ('print(\'["Version\\\\n  mismatch", 0, ""]\')', "cannot be joined: Version mismatch"),
        (
            "import sys, time; print('Unauthenticated: x', file=sys.stderr, flush=True); "
            "time.sleep(60)",
            "asks for Ray's token, and this user's is another or none",
        ),
        (
            "import sys; print('Unauthenticated: x', file=sys.stderr); raise RuntimeError('end')",
            "asks for Ray's token, and this user's is another or none",
        ),
    ],
)
def test_a_server_that_is_no_ray_of_ours_is_not_waited_for(
    program: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = Target(f"127.0.0.1:{server.getsockname()[1]}", "F")
        monkeypatch.setattr(running_ray, "_ASK", program)
        for timeout_s in (1.0, 20.0, 120.0):  # a busy machine needs longer to start the program
            monkeypatch.setattr(running_ray, "ASK_TIMEOUT_S", timeout_s)
            found = look_at(target).reason
            if found.startswith(reason):
                break
        assert found.startswith(reason)
        assert look_at(Target(f"ray://{target.address}", "F")).reason == ""


@pytest.mark.parametrize(
    ("given", "is_there"),
    [
        ({}, False),
        ({"HOME": "with"}, True),
        ({"RAY_AUTH_TOKEN": "x"}, True),
        ({"RAY_AUTH_TOKEN_PATH": "with/.ray/auth_token"}, True),
        ({"RAY_AUTH_TOKEN_PATH": "nothing", "HOME": "with"}, False),
    ],
)
def test_a_token_is_found_where_ray_has_it(
    given: dict[str, str], is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "with" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0123")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", given.get("HOME", str(tmp_path)))
    assert user_has_token(given) == is_there


def test_what_is_installed_here_is_read_from_our_own_requirements() -> None:
    found = probe.find_installed()
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.packages["ray"] is not None
    assert "pytest" not in found.packages  # an extra's
    assert any(text.startswith("ray[serve]") for text in found.requirements)


@pytest.mark.parametrize(
    ("program", "gpus", "reason"),
    [
        ('print(\'["2.13", [["H100", 80]]]\')', (Gpu("H100", 80),), ""),
        ("print('hello'); print('[\"2.13\", []]')", (), ""),
        ("raise ImportError('libcuda is gone')", (), "ImportError: libcuda is gone"),
        ("import os; os.abort()", (), "it said nothing"),
        ("import time; time.sleep(60)", (), "no answer within 1 s"),
    ],
)
def test_torch_is_asked_for_gpus_and_may_fail(
    program: str, gpus: tuple[Gpu, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_ASK_TORCH", program)
    monkeypatch.setattr(probe, "TORCH_TIMEOUT_S", 1.0)
    found = probe.find_devices()
    assert (found.gpus, found.reason) == (gpus, reason)
    assert found.num_cpus >= 1


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Examine this machine, with a file of this text; torch is not asked, and no Ray counts."""
    monkeypatch.setattr(probe, "_ASK_TORCH", "print('[\"2.13\", []]')")
    monkeypatch.setattr(probe, "raylets", lambda: [])
    monkeypatch.setattr("router.ops.doctor.doctor.MAX_SOCKET_PATH", 500)

    def examine(text: str | None = None) -> dict[str, Check]:
        file = None
        if text is not None:
            file = tmp_path / "cluster.yaml"
            file.write_text(text)
        return {one.name: one for one in probe.examine(file, {"RAY_TMPDIR": str(tmp_path)})}

    return examine


def test_everything_is_looked_at(examined: Examine) -> None:
    document = shipped_document(*free_ports(2))
    found = examined(yaml.safe_dump(document))
    assert {"versions", "devices", "memory", "/dev/shm", "Ray's folder", "ray"} <= found.keys()
    assert (found["ports"].level, found["file"].level) == ("ok", "ok")
    assert examined().keys() == found.keys() - {"ports", "file"}
    # Another machine may have the model.
    document["applications"][0]["args"]["models"][0]["path"] = "/nowhere"
    assert examined(yaml.safe_dump(document))["file"].level == "warning"


def test_a_bad_file_is_one_problem_and_the_rest_is_still_looked_at(examined: Examine) -> None:
    found = examined("applications: 3")
    [problem] = [check for check in found.values() if check.level == "problem"]
    assert problem.name == "file"
    assert problem.advice.startswith("Mend /")
    assert "versions" in found


def test_native_code_that_cannot_be_loaded_is_as_if_it_was_not_built(
    examined: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (examined()["native code"].level == "ok") == (built.native is not None)
    monkeypatch.setitem(sys.modules, "expertmesh_native", None)
    monkeypatch.setattr(probe, "native", runpy.run_path(str(built.__file__))["native"])
    assert examined()["native code"].level == "warning"
