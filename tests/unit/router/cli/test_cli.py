"""The ``expertmesh`` command against a real gRPC server with a scripted upstream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from benchmarks.shipped import DEPLOYED
from cluster.errors import CheckpointError, ConfigError, OverloadedError
from cluster.spec import ModelKernel
from router.cli.app import app
from router.cli.status import BAR_WIDTH, _summary, _table, _tables
from tests.unit.gateway_fakes import STATUS, FakeUpstream, grpc_server, says, tokenizer
from tests.unit.terminal import Terminal

NOBODY = "127.0.0.1:1"
ROOT = Path(__file__).parents[4]


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream(says(" was the word 🙂"))


@pytest.fixture
def address(upstream: FakeUpstream) -> Iterator[str]:
    with grpc_server(upstream) as opened:
        yield opened


def run(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def test_the_version_is_that_of_the_package() -> None:
    result = run("--version")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (result.exit_code, result.stdout) == (
        0,
        f"expertmesh {declared['project']['version']}\n",
    )


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_generate_prints_the_text(address: str, stream: list[str]) -> None:
    result = run("generate", "in the", "--address", address, *stream)
    assert (result.exit_code, result.stdout) == (0, " was the word 🙂\n")


def test_generate_passes_its_options_on(address: str, upstream: FakeUpstream) -> None:
    options = {"--max-tokens": 5, "--temperature": 0.5, "--top-p": 0.9, "--top-k": 3, "--seed": 7}
    flat = [str(one) for pair in options.items() for one in pair]
    result = run(
        "generate", "in", "--address", address, "--model", "bare", "--stop", "the", "--stop", "zzz",
        "--timeout", "30", *flat,
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, " was \n")
    [request] = upstream.requests
    assert request.model == "bare"
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.5, 0.9)
    assert (sampling.top_k, sampling.seed) == (3, 7)


def test_generate_as_json(address: str) -> None:
    result = run("generate", "in", "--address", address, "--json")
    reply = json.loads(result.stdout)
    assert reply["text"] == " was the word 🙂"
    assert reply["token_ids"] == tokenizer().encode(" was the word 🙂")
    assert reply["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == len(reply["token_ids"])
    lines = run("generate", "in", "--address", address, "--json", "--stream").stdout.splitlines()
    assert "".join(json.loads(line)["text"] for line in lines) == " was the word 🙂"


def test_status_as_json(address: str) -> None:
    result = run("status", "--json", "--address", address)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "models": ["tiny"],
        "epoch": 3,
        "placement_version": 7,
        "controller_pid": 41,
        "missing_experts": 0,
        "routers": [
            {
                "pid": 42,
                "node": "n1",
                "kernels": [{"model": "tiny", "kernel_class": "torch-avx2"}],
                "problem": "",
            }
        ],
        "gateways": [{"pid": 43, "node": "n1", "kernels": [], "problem": "keys.yaml: is no file"}],
        "actors": [
            {
                "actor_id": "a0",
                "pid": 44,
                "node": "n1",
                "device": "cpu",
                "generation": 2,
                "experts": [["tiny", 0, 1], ["tiny", 1, 5]],
                "tokens": 99,
                "weight_bytes": 640,
                "kernels": [{"model": "tiny", "kernel_class": "paired"}],
                "silence": "has answered no heartbeat for 4 s: routers hear it",
                "slowness": 0.0,
                "is_slow": False,
            }
        ],
        "min_copies": 2,
        "live_copies": 1,
        "loading": [
            {
                "actor_id": "a1",
                "held_experts": 3,
                "num_experts": 12,
                "weight_bytes": 1_500_000_000,
            }
        ],
        "kernels": [
            {
                "model": "tiny",
                "actors": [
                    {"kernel_class": "fused", "processes": 2},
                    {"kernel_class": "paired", "processes": 1},
                ],
                "routers": [{"kernel_class": "torch-avx2", "processes": 1}],
                "mixed": "fused on 2 actors, paired on 1",
            }
        ],
        "failing": [
            {
                "actor_id": "a2",
                "deaths": 3,
                "reason": "n1 lacks 5 bytes",
                "node": "n1",
                "device": "cuda:0",
                "retry_in_s": 12.5,
                "failed_tests": 0,
                "needed_bytes": 9,
                "missing_bytes": 5,
            }
        ],
        "nodes_without_gateway": ["n4"],
    }


def test_status_as_a_table(address: str) -> None:
    result = run("status", "--address", address)
    assert result.exit_code == 0
    assert "copies: 1 live, 2 wanted" in result.stdout
    for shown in ("tiny", "version 7", "ready", "pid 41", "42@n1", "43@n1", "a0", "44", "99"):
        assert shown in result.stdout


def test_status_says_which_kernels_are_mixed(address: str) -> None:
    lines = run("status", "--address", address).stdout.splitlines()
    assert "tiny is mixed: fused on 2 actors, paired on 1" in lines
    whole = replace(STATUS, kernels=(replace(STATUS.kernels[0], mixed=""),))
    assert "mixed" not in _summary(whole)


def test_status_says_which_actors_are_silent_and_why_they_are_kept(address: str) -> None:
    lines = run("status", "--address", address).stdout.splitlines()
    assert "a0 has answered no heartbeat for 4 s: routers hear it" in lines
    heard = replace(STATUS, kernels=(), failing=(), actors=(replace(STATUS.actors[0], silence=""),))
    assert _summary(heard).splitlines()[2:] == [
        "gateway 43@n1: keys.yaml: is no file",
        "node n4 has no gateway",
    ]
    whole = replace(heard, gateways=(), nodes_without_gateway=())
    assert len(_summary(whole).splitlines()) == 2


def test_status_has_a_line_for_each_actor_that_fails(address: str) -> None:
    lines = run("status", "--address", address).stdout.splitlines()
    line = "a2 on cuda:0, n1 fails: 3 deaths in a row, next start in 12.5 s; n1 lacks 5 bytes"
    assert line in lines
    assert len(_summary(replace(STATUS, failing=())).splitlines()) == 6


def test_status_shows_an_actors_kernels_by_model_where_they_differ() -> None:
    [actor] = STATUS.actors
    one, other = ModelKernel("tiny", "fused"), ModelKernel("big", "paired")

    def device_of(*kernels: ModelKernel) -> list[str]:
        table = _table(replace(STATUS, actors=(replace(actor, kernels=kernels),)))
        [column] = [column for column in table.columns if column.header == "device"]
        return [str(cell) for cell in column.cells]

    assert device_of(one, replace(one, model="big")) == ["cpu, fused"]
    assert device_of(one, other) == ["cpu, big: paired, tiny: fused"]
    assert device_of() == ["cpu"]


def test_status_has_a_bar_for_each_actor_that_loads(address: str) -> None:
    result = run("status", "--address", address)
    [line] = [line for line in result.stdout.splitlines() if line.startswith("a1")]
    assert line.count("━") == BAR_WIDTH * 3 // 12
    assert line.endswith("3 of 12  1.5 GB")
    shown = _tables(replace(STATUS, loading=()))
    assert len(shown.renderables) == 1


def next_line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_watching_outlives_the_server_and_ends_by_ctrl_c(upstream: FakeUpstream) -> None:
    code = "from router.cli.main import main; main()"
    words = ["status", "--watch", "--json", "--interval", "0.1"]
    with grpc_server(upstream) as address:
        watching = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EXPERTMESH_ADDRESS": address},
        )
        assert [next_line(watching)["epoch"] for _ in range(2)] == [3, 3]
    while "error" not in (told := next_line(watching)):
        assert told["epoch"] == 3
    host, _, port = address.partition(":")
    assert f"at {host}:{int(port) + 1}, where gateways" in told["error"]["message"]
    with grpc_server(upstream, int(address.rpartition(":")[2])):
        while "error" in (told := next_line(watching)):
            assert told["error"]["code"] == "unavailable"
        assert told["epoch"] == 3
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=20)
    assert (watching.returncode, stderr) == (0, "")


def test_watching_at_a_terminal_shows_that_the_server_is_away(upstream: FakeUpstream) -> None:
    with grpc_server(upstream) as address:
        terminal = Terminal("status", "--watch", "--interval", "0.1", "--address", address)
        terminal.wait_for("tokens/s")
        terminal.wait_for("Ctrl-C ends")
    terminal.wait_for("; the status above is ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0


def test_watching_needs_a_server_at_first() -> None:
    result = run("status", "--watch", "--address", NOBODY)
    assert (result.exit_code, result.stdout) == (3, "")


def test_a_refusal_is_one_line_and_1(address: str, upstream: FakeUpstream) -> None:
    result = run("generate", "in", "--address", address, "--top-p", "2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "sampling.top_p" in result.stderr
    assert result.stderr.count("\n") == 1
    upstream.script = lambda request: [OverloadedError("the queue is full", retry_after_s=1)]
    result = run("generate", "in", "--address", address, "--stream")
    assert (result.exit_code, result.stderr) == (1, "expertmesh: the queue is full\n")


@pytest.mark.parametrize("command", [["status"], ["generate", "in"], ["generate", "x", "--stream"]])
def test_nobody_at_the_address_is_3(command: list[str]) -> None:
    result = run(*command, "--address", NOBODY)
    assert (result.exit_code, result.stdout) == (3, "")
    place = "127.0.0.1:2, where gateways answer operators" if command == ["status"] else NOBODY
    assert f"no ExpertMesh server answers at {place}; is" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["nothing"], ["generate"], ["generate", "x", "--max-tokens", "many"], ["check"]]
)
def test_bad_usage_is_2(command: list[str]) -> None:
    assert run(*command).exit_code == 2


def stub_check(monkeypatch: pytest.MonkeyPatch, result: list[str] | Exception) -> None:
    def check_file(path: Path) -> list[str]:
        if isinstance(result, Exception):
            raise result
        return [f"{path.name}: {line}" for line in result]

    module: Any = types.ModuleType("router.served")
    module.check_file = check_file
    monkeypatch.setitem(sys.modules, "router.served", module)


def test_check_prints_what_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_check(monkeypatch, ["two models"])
    result = run("check", str(DEPLOYED))
    assert (result.exit_code, result.stdout) == (0, "cluster.yaml: two models\n")
    told = json.loads(run("check", str(DEPLOYED), "--json").stdout)
    assert told == {"ok": True, "checks": ["cluster.yaml: two models"]}


def test_check_refuses_a_host_that_others_reach_without_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub_check(monkeypatch, ["two models"])
    file = tmp_path / "cluster.yaml"
    document = yaml.safe_load(DEPLOYED.read_text())
    document["applications"][0]["args"]["gateway"]["listen"] = {"host": "0.0.0.0"}
    file.write_text(yaml.safe_dump(document))
    result = run("check", str(file))
    assert result.exit_code == 2
    assert "gateway.listen.host: must be an address of this machine if" in result.stderr
    assert "there are no keys; got '0.0.0.0'" in result.stderr


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_check_refuses_options_of_serves_proxies(
    form: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub_check(monkeypatch, ["two models"])
    file = tmp_path / "cluster.yaml"
    file.write_text("http_options: {port: 81}\n" + DEPLOYED.read_text())
    result = run("check", str(file), *form)
    assert result.exit_code == 2
    if form:
        assert json.loads(result.stdout)["error"]["field"] == "http_options"
    else:
        [line] = result.stderr.splitlines()
        assert "http_options: is of Serve's proxies" in line
        assert line.endswith("args.gateway: {listen: {host: 0.0.0.0, http_port: 81}}")


@pytest.mark.parametrize(
    "error", [ConfigError("unknown key", "args.modles"), CheckpointError("is cut\noff", "a.st")]
)
def test_check_of_something_wrong_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, error: ConfigError
) -> None:
    stub_check(monkeypatch, error)
    result = run("check", "some/cluster.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"expertmesh: {' '.join(str(error).split())}\n"
    told = run("check", "some/cluster.yaml", "--json")
    assert told.exit_code == 2
    assert json.loads(told.stdout)["error"]["field"] == error.field


@pytest.mark.parametrize(
    "address", ["somewhere", "a:", ":9", "a:0", "a:65536", "http://a:9", "::1:9"]
)
def test_a_bad_address_is_one_line_and_2(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = run("status", "--address", address)
    monkeypatch.setenv("EXPERTMESH_ADDRESS", address)
    assert [(one.exit_code, one.stdout) for one in (given, run("status"))] == [(2, "")] * 2
    assert given.stderr == (
        f"expertmesh: --address: must be host:port, as 127.0.0.1:9000; got {address!r}\n"
    )


def test_the_address_may_stand_in_the_environment(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_ADDRESS", address)
    assert run("generate", "in").stdout == " was the word 🙂\n"
    assert run("status", "--address", NOBODY).exit_code == 3


def test_a_reader_that_leaves_gets_no_stack(address: str) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from router.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "in", "--stream", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        env={**os.environ, "EXPERTMESH_ADDRESS": address},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_text_that_the_output_has_no_letters_for_is_no_failure(address: str) -> None:
    code = "from router.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "in", "--address", address],
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b" was the word ?\n", b"")


def test_ctrl_c_is_130_without_a_stack(address: str, upstream: FakeUpstream) -> None:
    upstream.endless = True
    upstream.script = says(" was", finish_reason=None)
    terminal = Terminal("generate", "in", "--stream", "--address", address)
    terminal.wait_for(" was")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert upstream.closed.wait(10)
    assert "Traceback" not in terminal.shown


COMMANDS = [
    "generate",
    "chat",
    "status",
    "load",
    "placement",
    "rebalance",
    "scale",
    "drain",
    "copies",
    "bench",
    "check",
    "plan",
    "doctor",
    "explain",
    "fit",
    "config new",
    "config schema",
    "config show",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: expertmesh {command}" in result.stdout


def test_help_tells_the_exit_codes() -> None:
    assert "Exit codes" in run("--help").stdout
