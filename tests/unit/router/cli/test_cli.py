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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import pytest
import typer
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
PROGRAM = (sys.executable, "-c", "from router.cli.main import main; main()")


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream(says(" was the word 🙂"))


def run(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def test_the_version_is_that_of_the_package() -> None:
    result = run("--version")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (result.exit_code, result.stdout) == (
        0,
        f"expertmesh {declared['project']['version']}\n",
    )


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
    told = json.loads(result.stdout)
    assert told == json.loads(json.dumps(asdict(STATUS)))
    names = "models epoch placement_version controller_pid missing_experts routers gateways actors "
    names += "min_copies live_copies loading kernels failing nodes_without_gateway failed_deploy"
    assert [*told] == names.split()  # which scripts read
    of_actor = "actor_id pid node device generation experts tokens weight_bytes kernels silence "
    assert [*told["actors"][0]] == f"{of_actor}slowness is_slow".split()
    of_failing = "actor_id deaths reason node device retry_in_s failed_tests needed_bytes "
    assert [*told["failing"][0]] == f"{of_failing}missing_bytes".split()
    assert [*told["loading"][0]] == ["actor_id", "held_experts", "num_experts", "weight_bytes"]
    assert [*told["kernels"][0]] == ["model", "actors", "routers", "mixed"]
    assert [*told["gateways"][0]] == ["pid", "node", "kernels", "problem"]
    assert told["actors"][0]["experts"] == [["tiny", 0, 1], ["tiny", 1, 5]]
    assert told["routers"][0]["kernels"] == [{"model": "tiny", "kernel_class": "torch-avx2"}]


def test_status_is_a_table_and_a_line_for_each_thing_that_is_not_as_it_should(address: str) -> None:
    result = run("status", "--address", address)
    assert result.exit_code == 0
    assert "copies: 1 live, 2 wanted" in result.stdout
    for shown in ("tiny", "version 7", "ready", "pid 41", "42@n1", "43@n1", "a0", "44", "99"):
        assert shown in result.stdout
    lines = result.stdout.splitlines()
    assert lines[2:7] == [
        "tiny is mixed: fused on 2 actors, paired on 1",
        "a0 has answered no heartbeat for 4 s: routers hear it",
        "a2 on cuda:0, n1 fails: 3 deaths in a row, next start in 12.5 s; n1 lacks 5 bytes",
        "gateway 43@n1: keys.yaml: is no file",
        "node n4 has no gateway",
    ]
    [line] = [line for line in lines if line.startswith("a1")]  # it loads
    assert line.count("━") == BAR_WIDTH * 3 // 12
    assert line.endswith("3 of 12  1.5 GB")


def test_status_of_a_whole_cluster_has_no_such_lines() -> None:
    whole = replace(
        STATUS,
        kernels=(replace(STATUS.kernels[0], mixed=""),),
        actors=(replace(STATUS.actors[0], silence=""),),
        failing=(),
        gateways=(),
        nodes_without_gateway=(),
        loading=(),
    )
    assert len(_summary(whole).splitlines()) == 2
    assert len(_tables(whole).renderables) == 1


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


def test_watching_outlives_the_server_and_ends_by_ctrl_c(upstream: FakeUpstream) -> None:
    words = ["status", "--watch", "--json", "--interval", "0.1"]
    with grpc_server(upstream) as address:
        watching = subprocess.Popen(
            [*PROGRAM, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EXPERTMESH_ADDRESS": address},
        )
        assert watching.stdout is not None
        lines = map(json.loads, watching.stdout)
        assert [next(lines)["epoch"] for _ in range(2)] == [3, 3]
    while "error" not in (told := next(lines)):
        assert told["epoch"] == 3
    host, _, port = address.partition(":")
    assert f"at {host}:{int(port) + 1}, where gateways" in told["error"]["message"]
    with grpc_server(upstream, int(address.rpartition(":")[2])):
        while "error" in (told := next(lines)):
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


Outcome = list[str] | Exception


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """What the check of a file's models says, or how it fails; the last one counts."""
    outcomes: list[Outcome] = [["two models"]]

    def check_file(path: Path) -> list[str]:
        if isinstance(outcomes[-1], Exception):
            raise outcomes[-1]
        return [f"{path.name}: {line}" for line in outcomes[-1]]

    module: Any = types.ModuleType("router.served")
    module.check_file = check_file
    monkeypatch.setitem(sys.modules, "router.served", module)
    return outcomes


@pytest.mark.usefixtures("checked")
def test_check_prints_what_is_fine() -> None:
    result = run("check", str(DEPLOYED))
    assert (result.exit_code, result.stdout) == (0, "cluster.yaml: two models\n")
    told = json.loads(run("check", str(DEPLOYED), "--json").stdout)
    assert told == {"ok": True, "checks": ["cluster.yaml: two models"]}


def refusals(file: Path) -> tuple[str, str]:
    """Return the line with which a file is refused, and the field that JSON names."""
    result = run("check", str(file))
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    as_json = run("check", str(file), "--json")
    assert as_json.exit_code == 2
    return line, json.loads(as_json.stdout)["error"]["field"]


@pytest.mark.parametrize(
    "error", [ConfigError("unknown key", "args.modles"), CheckpointError("is cut\noff", "a.st")]
)
def test_check_of_something_wrong_is_one_line_and_2(
    checked: list[Outcome], error: ConfigError
) -> None:
    checked.append(error)
    line, field = refusals(DEPLOYED)
    assert (line, field) == (f"expertmesh: {' '.join(str(error).split())}", error.field)


@pytest.mark.usefixtures("checked")
def test_check_refuses_an_open_host_without_keys_and_options_of_proxies(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    document = yaml.safe_load(DEPLOYED.read_text())
    document["applications"][0]["args"]["gateway"]["listen"] = {"host": "0.0.0.0"}
    file.write_text(yaml.safe_dump(document))
    line, field = refusals(file)
    assert field == f"{file}: gateway.listen.host"
    assert "must be an address of this machine if there are no keys; got '0.0.0.0'" in line
    file.write_text("http_options: {port: 81}\n" + DEPLOYED.read_text())
    line, field = refusals(file)
    assert field == f"{file}: http_options"
    assert line.endswith("args.gateway: {listen: {host: 0.0.0.0, http_port: 81}}")


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
    done = subprocess.run(
        [*PROGRAM, "generate", "in", "--stream", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        env={**os.environ, "EXPERTMESH_ADDRESS": address},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_text_that_the_output_has_no_letters_for_is_no_failure(address: str) -> None:
    done = subprocess.run(
        [*PROGRAM, "generate", "in", "--address", address],
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


def all_commands(group: Any, context: click.Context, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each command's words, and its help."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from all_commands(command, context, f"{path}{name} ")
        else:
            yield f"{path}{name}", command.help or ""


def test_help_of_every_command_has_an_example_and_exit_codes_are_told() -> None:
    top = typer.main.get_command(app)
    helps = dict(all_commands(top, click.Context(top)))
    assert {"generate", "fit", "config new", "keys revoke"} <= helps.keys()
    assert [name for name, told in helps.items() if f"Example: expertmesh {name}" not in told] == []
    assert "Example: expertmesh copies" in run("copies", "--help").stdout
    assert "Exit codes" in run("--help").stdout
