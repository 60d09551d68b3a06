"""``expertmesh predict`` and ``config schema --mixture``, against a real gRPC server."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.errors import InvalidRequestError, UnavailableError
from router.cli.app import app
from router.cli.rows import MAX_BATCH_BYTES, batches, output_rows, parse_rows, plain, read_table
from router.client import MixtureInfo, TensorInfo
from router.messages.prediction import PredictionRequest
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, says
from tests.unit.prediction_fakes import LABELS, FakePredictions, computed
from tests.unit.router.cli.test_cli import NOBODY, run
from tests.unit.terminal import Terminal

PIXELS = "pixels[0],pixels[1],pixels[2],pixels[3]"
DIGITS = "0,1,2,3\n1,0.5,-1,1e-3\n\n2,0,0,7\n"
HEADER = "label,probabilities[0],probabilities[1],probabilities[2],experts[0],experts[1]"
ROWS = [
    f"{LABELS[0]},0.0,6.0,3.0,0,-1",
    f"{LABELS[1]},1.0,-0.499,0.001,0,-1",
    f"{LABELS[2]},2.0,7.0,7.0,0,-1",
]


@pytest.fixture
def upstream() -> FakePredictions:
    return FakePredictions()


@pytest.fixture(autouse=True)
def address(upstream: FakePredictions, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with grpc_server(FakeUpstream(says("x")), predictions=upstream) as opened:
        monkeypatch.setenv("EXPERTMESH_ADDRESS", opened)
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "data.csv"
    file.write_text(DIGITS, encoding="utf-8")
    return file


def predicted(model: str, file: Path, *words: str) -> list[str]:
    result = run("predict", model, str(file), *words)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.mark.parametrize("header", ["", "d,a,b,c\n", "\ufeffd,a,b,c\n"])
def test_csv_in_and_csv_out_with_and_without_a_header(header: str) -> None:
    args = ["predict", "digits", "-"]
    result = CliRunner().invoke(app, args, input=f"{header}{DIGITS}".encode())
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [HEADER, *ROWS]


def test_columns_may_be_named_in_any_order_and_left_out(
    file: Path, upstream: FakePredictions
) -> None:
    file.write_text("id,site,pixels[3],pixels[0],pixels[2],pixels[1],target\nx,1,3,0,2,1,y\n")
    ignored = ["--ignore", "id", "--ignore", "site", "--ignore", "target"]
    assert predicted("digits", file, *ignored, "--output", "label") == ["label", LABELS[0]]
    np.testing.assert_array_equal(upstream.requests[0].inputs["pixels"], [[0, 1, 2, 3]])
    assert upstream.requests[0].outputs == ("label",)


def test_several_inputs(file: Path, upstream: FakePredictions) -> None:
    file.write_text(
        "a,b,c,d,e,f,site,flags[0],flags[1],bytes,counts\n"
        "1,2,3,4,5,6,1,true,0,255,-9007199254740993\n"
        "1,2,3,4,5,6,0,FALSE,1,0,0\n"
    )
    assert predicted("team/flow", file)[0] == "value[0],value[1]"
    inputs = upstream.requests[0].inputs
    assert inputs["features"].tolist() == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]] * 2
    assert inputs["site"].tolist() == [[1], [0]]
    assert inputs["flags"].tolist() == [[True, False], [False, True]]
    assert inputs["bytes"].tolist() == [[255], [0]]
    assert inputs["counts"].tolist() == [[-9007199254740993], [0]]


def test_without_its_target_a_log_density_is_left_out(file: Path) -> None:
    for text, columns in (
        ("1,2,3,4\n", "mean"),
        (f"{PIXELS},target\n1,2,3,4,5\n", "mean,log_density"),
    ):
        file.write_text(text)
        lines = predicted("density", file)
        assert lines[0] == columns
        assert len(lines[1].split(",")) == len(columns.split(","))
    refused = run("predict", "density", str(file), "--ignore", "target", "--output", "log_density")
    assert refused.exit_code == 1
    assert "inputs.target: is missing; the output log_density needs it" in refused.stderr


def test_sequences_of_other_lengths(file: Path, upstream: FakePredictions) -> None:
    file.write_text("1,0,1,0\n1,0,1,0\n5,0\n1,0,,\n1,0,1,0\n")
    assert list(csv.reader(predicted("waves", file))) == [
        ["value"], *[["[[1.0], [2.0]]"]] * 2, ["[[5.0]]"], ["[[1.0]]"], ["[[1.0], [2.0]]"],
    ]  # fmt: skip
    assert [request.num_rows for request in upstream.requests] == [2, 2, 1]


def test_json_and_a_file(file: Path, tmp_path: Path) -> None:
    assert json.loads(predicted("digits", file, "--json")[1]) == {
        "exact": True,
        "outputs": {"label": LABELS[1], "probabilities": [1.0, -0.499, 0.001], "experts": [0, -1]},
    }
    out = tmp_path / "out.csv"
    assert predicted("digits", file, "--out", str(out)) == []
    assert out.read_text(encoding="utf-8").splitlines() == [HEADER, *ROWS]


def test_many_rows_go_in_several_requests(file: Path, upstream: FakePredictions) -> None:
    file.write_text("".join(f"{n},0,0,0\n" for n in range(2500)))
    lines = predicted("digits", file, "--output", "probabilities")
    assert [float(line.split(",")[0]) for line in lines[1:]] == list(range(2500))
    assert [request.num_rows for request in upstream.requests] == [1024, 1024, 452]
    predicted("digits", file, "--batch-rows", "2000")
    assert [request.num_rows for request in upstream.requests[3:]] == [2000, 500]


def test_a_terminal_gets_a_table_without_control_codes(
    file: Path, upstream: FakePredictions
) -> None:
    def hostile(request: PredictionRequest) -> dict[str, np.ndarray]:
        labels = {"label": np.array([["\x1b[31m[red]x"], ["y"], ["z"]])}
        return {name: {**computed(request), **labels}[name] for name in request.outputs}

    upstream.compute = hostile
    outputs = ["--output", "label", "--output", "probabilities"]
    terminal = Terminal("predict", "digits", str(file), *outputs)
    for shown in ("probabilities[2]", "\ufffd[31m[red]x", "-0.499", "0.001"):
        terminal.wait_for(shown)
    assert terminal.process.wait(20) == 0


def test_rows_that_are_not_exact_are_told(file: Path, upstream: FakePredictions) -> None:
    upstream.exact = False
    args = ("--on-expert-loss", "drop", "--timeout", "7", "--json")
    result = run("predict", "digits", str(file), *args)
    assert result.exit_code == 0
    assert result.stderr.startswith("3 of 3 rows are in replies that are not exact")
    assert all(json.loads(line)["exact"] is False for line in result.stdout.splitlines())
    assert upstream.requests[0].on_expert_loss == "drop"
    assert upstream.requests[0].remaining_s() < 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("a,b,c,d\n", "has no rows; its first line was read as the names of columns (--no-header)"),
        ("1,2,3\n", "input pixels: has 3 columns, must have 4 values of FP32"),
        ("a,b,c,d\n1,2,x,4\n", "line 2, column c: must be a value of FP32; got 'x'"),
        ("1,2,3,4\n1,x,3,4\n", "line 2, column 1: must be a value of FP32; got 'x'"),
        ("a,b,c,d\n1,2,3\n", "line 2, column d: must be a value of FP32; got ''"),
        ("a,b,c,d\n1,2,3,4,5\n", "line 2: has 5 cells, but the header has 4"),
        ("pixels[0],pixels[2]\n1,2\n", "column pixels[1]: is missing"),
        ("pixels[0],pixels[0]\n1,2\n", "column pixels[0]: appears twice"),
        (f"{PIXELS},id\n1,2,3,4,5\n", "columns id: belong to no input; inputs: pixels"),
        ('a,b,c,d\n"1,2,3,4\n', "line 3: is not valid CSV: unexpected end of data"),
    ],
)
def test_a_wrong_file_is_exit_code_2(
    file: Path, upstream: FakePredictions, text: str, message: str
) -> None:
    file.write_text(text)
    result = run("predict", "digits", str(file))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"expertmesh: {file}: {message}")
    assert upstream.requests == []


def test_what_else_fails(file: Path, tmp_path: Path, upstream: FakePredictions) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"a,b,c,d\xe9\n1,2,3,4\n")
    for args, code, message in (
        (("digits", str(tmp_path / "none.csv")), 2, "No such file"),
        (("digits", str(latin)), 2, "is not valid CSV: 'utf-8' codec"),
        (("digits", str(file), "--output", "votes"), 2, "must be one of label, probabilities"),
        (("digits", str(file), "--out", str(tmp_path)), 2, "Is a directory"),
        (("digits", str(file), "--ignore", "id"), 2, "the file has no header"),
        (("nobody", str(file)), 1, "is not served here"),
        (("tiny", str(file)), 1, "is a language model"),
    ):
        result = run("predict", *args)
        assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert run("predict", "digits", str(file), "--address", NOBODY).exit_code == 3
    upstream.error = UnavailableError("lost", "", None)
    result = run("predict", "digits", str(file), "--timeout", "0.2")
    assert (result.exit_code, "lost" in result.stderr) == (1, True)


INFO = MixtureInfo(
    "m",
    (TensorInfo("x", "UINT8", (-1, 1)), TensorInfo("y", "FP64", (-1, 2))),
    (TensorInfo("value", "FP32", (-1, 1)), TensorInfo("log", "FP64", (-1, 1))),
)


def test_a_number_that_its_datatype_cannot_hold() -> None:
    table = read_table(io.StringIO("x\n300\n"), None)
    with pytest.raises(InvalidRequestError, match="input x: has a number that UINT8 cannot hold"):
        list(batches(parse_rows(table, INFO, ()), INFO, 10))


def test_requests_are_bounded_by_bytes() -> None:
    wide = MixtureInfo("m", (TensorInfo("x", "FP64", (-1, 40_000)),), INFO.outputs)
    text = ",".join(["1"] * 40_000) + "\n"
    rows = parse_rows(read_table(io.StringIO(text * 7), None), wide, ())
    sizes = [given["x"].nbytes for given in batches(rows, wide, 1024)]
    assert max(sizes) <= MAX_BATCH_BYTES
    assert len(sizes) == 3


def test_fp32_is_written_with_the_digits_that_mean_it_and_an_infinity_as_nothing() -> None:
    array = np.array([[0.1], [-np.inf], [16777216.0]], np.float32)
    assert plain(array) == [[0.1], [None], [16777216.0]]
    rows = list(
        output_rows({"value": array, "log": np.array([[1.5], [2], [np.nan]])}, INFO.outputs)
    )
    assert rows == [[0.1, 1.5], [None, 2.0], [16777216.0, None]]


def test_the_schema_of_a_mixture() -> None:
    schema = json.loads(run("config", "schema", "--mixture").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    good: dict[str, Any] = {
        "format": 1,
        "dtype": "float32",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
        "gate": "top",
        "gates": {"top": {"kind": "linear", "file": "gate.safetensors", "choices": ["a"]}},
        "experts": {"a": {"kind": "linear", "file": "a.safetensors"}},
        "combine": {"kind": "mean", "shape": [1]},
        "outputs": [{"name": "y", "datatype": "FP32", "from": "value"}],
    }
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, "dtype": "int8"})
    assert not validator.is_valid({**good, "unknown": 1})
    assert run("config", "schema", "--mixture", "--args").exit_code == 2
