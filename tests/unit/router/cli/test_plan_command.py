"""``expertmesh plan`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import deploy
from router.cli.app import app
from router.ops.plan.plan import Wish, make_plan
from router.ops.plan.source import find_model


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "100"})


def test_the_json_is_the_plan() -> None:
    result = run("mixtral-8x7b", "--copies", "2", "--device-memory", "80GB", "--json")
    assert result.exit_code == 0
    wish = Wish(copies=2, device_memory_bytes=80 * 10**9)
    expected = make_plan(find_model("mixtral-8x7b"), wish).to_json() | {"problems": []}
    assert json.loads(result.stdout) == json.loads(json.dumps(expected))


def test_people_read_what_is_needed_and_that_it_fits() -> None:
    result = run("mixtral-8x7b", "--copies", "2", "--device-memory", "80GB")
    assert result.exit_code == 0
    for words in ("46.7 billion parameters", "352 MB", "180 GB", "3 devices", "All of it fits."):
        assert words in result.stdout
    assert "Not served" not in result.stdout


def test_what_does_not_fit_is_said_and_fails() -> None:
    result = run("mixtral-8x7b", "--device-memory", "24GB", "--devices", "2")
    assert result.exit_code == 1
    assert "2 devices: too few" in result.stdout
    assert "Does not fit: One copy of the experts need 45.7 GB" in result.stdout
    assert run("mixtral-8x7b", "--devices", "2").exit_code == 0  # nothing was given to fit on


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nope",), "neither a folder nor a known model"),
        (("LLAMA",), "unknown model_type 'llama'; known: dbrx"),
        (("mesh-tiny", "--device-memory", "24"), "--device-memory: must be a number and one of"),
        (("mesh-tiny", "--dtype", "fp8"), "--dtype: must be one of auto"),
        (("mesh-tiny", "--copies", "3", "--devices", "2"), "--copies: must be at most"),
        (("mesh-tiny", "--devices", "1001"), "--devices: must be at most 1000"),
        (("nope.yaml",), "nope.yaml: cannot be read"),
        (("some.yaml", "--copies", "2"), "--copies: applies only to a model"),
        (("some.yaml", "--dtype", "float16"), "--dtype: applies only to a model"),
        (("mesh-tiny", "--context", "1025"), "--context: must be at most the model's own, 1024"),
    ],
)
def test_bad_usage_is_one_line(args: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run(*(str(tmp_path) if arg == "LLAMA" else arg for arg in args))
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


GPU = str(Path(deploy.__file__).parent / "gpu.yaml")


def test_a_file_is_planned_device_by_device() -> None:
    result = run(GPU)
    assert result.exit_code == 0
    for words in ("router of mesh-tiny", "gpu-0", "in all", "24.0 GB or more"):
        assert words in result.stdout
    fits = run(GPU, "--device-memory", "24GB")
    assert (fits.exit_code, "All of it fits." in fits.stdout) == (0, True)
    tight = run(GPU, "--device-memory", "1GB")
    assert tight.exit_code == 1
    assert "Does not fit: Device 0 of 1.00 GB lacks" in tight.stdout
    as_json = run(GPU, "--json", "--device-memory", "1GB")
    assert as_json.exit_code == 1
    told = json.loads(as_json.stdout)
    [device] = told["devices"]
    assert [one["num_gpus"] for one in device["tenants"]] == [0.2, 0.8]
    assert device["most_bytes"] == sum(one["most_bytes"] for one in device["tenants"])
    assert (told["unplaced"], len(told["problems"])) == ([], 1)
    none = run(str(Path(GPU).parent / "cluster.yaml"))
    assert (none.exit_code, "num_gpus is 0 everywhere" in none.stdout) == (0, True)


def test_too_few_devices_are_told_by_the_process_that_waits(tmp_path: Path) -> None:
    document = yaml.safe_load(Path(GPU).read_text(encoding="utf-8"))
    args = document["applications"][0]["args"]
    args["router"]["replicas"] = args["experts"]["pools"][0]["actors"] = 2
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert run(str(file)).exit_code == 0  # on three
    result = run(str(file), "--devices", "2")
    assert result.exit_code == 1
    assert "gpu-1 would wait for ever: it needs 0.8 of a GPU" in " ".join(result.stdout.split())
