"""The format of ``mixture.yaml``: what it allows, and errors that name their key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.errors import CheckpointError
from experts.checkpoint.mixture import parse_spec
from experts.mixture.parts import MAX_ROW_VALUES
from experts.mixture.spec import MAX_LEVELS, MixtureSpec, most_experts, output_shape
from tests.unit.experts.mixture.documents import densities, document, sequences

FILE = Path("/folder/mixture.yaml")
Document = dict[str, Any]
LINEAR = {"kind": "linear", "file": "e.safetensors"}


def parsed(content: Document) -> MixtureSpec:
    return parse_spec(yaml.safe_dump(content, sort_keys=False).encode(), FILE)


def refused(content: Document, words: str) -> str:
    """Check that a document's error says the words; returns the key that it names."""
    with pytest.raises(CheckpointError, match=words) as caught:
        parsed(content)
    file, _, key = caught.value.field.partition(": ")
    assert file == str(FILE)
    return key


def test_a_whole_document() -> None:
    spec = parsed(document())
    assert spec.expert_names == ("a", "b", "c", "d")
    assert spec.rows_input.name == "x"
    assert spec.gate_input(spec.gates["right"]).name == "part"
    assert [output_shape(spec, output) for output in spec.outputs] == [(1,), (2,), (2,)]
    assert [most_experts(spec, name) for name in (None, "left", "right", "a")] == [2, 2, 1, 1]
    jsonschema.validate(document(), MixtureSpec.model_json_schema(by_alias=True))


def test_sequences_and_densities() -> None:
    spec = parsed(sequences())
    assert output_shape(spec, spec.outputs[0]) == (-1, 2)
    spec = parsed(densities())
    assert spec.combine.shape == (4,)
    assert output_shape(spec, spec.outputs[0]) == (1,)
    one = densities(combine={"kind": "density", "dimensions": 2, "target": "t", "deviation": 0.5})
    assert parsed(one).combine.shape == (2,)


@pytest.mark.parametrize(("top_k", "most"), [((2, 2), 3), ((2, 1), 2), ((1, 2), 2), ((1, 1), 1)])
def test_the_most_experts_of_a_row_are_those_of_the_widest_choices(
    top_k: tuple[int, int], most: int
) -> None:
    content = document("gates.root.top_k", top_k[0])
    content["gates"]["left"]["top_k"] = top_k[1]
    assert most_experts(parsed(content)) == most


# Errors that pydantic finds, by their key.


@pytest.mark.parametrize(
    ("path", "value", "key", "words"),
    [
        ("format", 2, "format", "should be 1"),
        ("dtype", "bfloat16", "dtype", "should be 'float32' or 'float64'"),
        ("description", "x" * 5000, "description", "at most 4096"),
        ("extra", 1, "extra", "not permitted"),
        ("inputs", [], "inputs", "at least 1"),
        ("inputs.0.shape", [], "inputs.0.shape", "at least 1"),
        ("inputs.0.shape", [1] * 5, "inputs.0.shape", "at most 4"),
        ("inputs.0.shape", [-1], "inputs.0.shape", "each axis must be at least 1"),
        ("inputs.0.shape", [3, -1], "inputs.0.shape", "each axis must be at least 1"),
        ("inputs.0.shape", [True], "inputs.0.shape.0", "integer"),
        ("inputs.0.shape", [1 << 20, 1 << 20], "inputs.0.shape", f"at most {MAX_ROW_VALUES}"),
        ("inputs.0.shape", [-1, 1 << 25], "inputs.0.shape", f"at most {MAX_ROW_VALUES}"),
        ("inputs.0.datatype", "FP16", "inputs.0.datatype", "'FP32'"),
        ("inputs.0.name", "a b", "inputs.0.name", "must be a name of letters"),
        ("inputs.0.width", 1, "inputs.0.width", "not permitted"),
        ("gates.root.kind", "softmax", "gates.root", "'linear', 'mlp', 'given'"),
        ("gates.root.kind", ..., "gates.root", "Unable to extract tag"),
        ("gates.root.choices", [], "gates.root.choices", "at least 1"),
        ("gates.root.top_k", 0, "gates.root.top_k", "greater than or equal to 1"),
        ("gates.root.top_k", 3, "gates.root", "top_k 3 exceeds the 2 choices"),
        ("gates.root.pool", "max", "gates.root.pool", "'flatten', 'mean' or 'last'"),
        ("gates.root.activation", "relu", "gates.root.activation", "not permitted"),
        ("gates.left.activation", "elu", "gates.left.activation", "'relu'"),
        ("experts.a.link", "tanh", "experts.a.link", "'none', 'softmax' or 'sigmoid'"),
        ("experts.a.prefix", "x" * 201, "experts.a.prefix", "at most 200"),
        ("experts.b.method", "transform", "experts.b.method", "'predict'"),
        ("experts.c.data", ["../c.bin"], "experts.c.data", "plain relative path of another file"),
        ("combine.kind", "sum", "combine", "'mean', 'probabilities', 'vote', 'density'"),
        ("combine.classes", ["no"], "combine.classes", "at least 2"),
        ("combine.classes", ["no", "no"], "combine.classes", "must differ from each other"),
        ("combine.classes", ["no", 1], "combine.classes", "integer|string"),
        ("combine.classes", [False, True], "combine.classes", "integer|string"),
        ("outputs.0.from", "value ", "outputs.0.from", "'value'"),
        ("outputs.0.datatype", "FP16", "outputs.0.datatype", "'INT64'"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_by_their_key(path: str, value: Any, key: str, words: str) -> None:
    found = refused(document(path, value), words)
    assert found.startswith(key)
    assert found.removeprefix(key).strip(".0123456789") == ""


@pytest.mark.parametrize(
    "file",
    ["../a.skops", "/etc/passwd", "a/../b.skops", "a//b.skops", "./a.skops", "a/", "", ".", "..",
     "mixture.yaml"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["experts.b.file", "gates.root.file"])
def test_files_are_plain_paths_inside_the_folder(key: str, file: str) -> None:
    words = "must be a plain relative path of another file in the folder"
    assert refused(document(key, file), words) == key


# Errors of parts against each other; the message begins with the key.


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("inputs.1.name", "x", "inputs: 'x' is used twice"),
        ("outputs.1.name", "label", "outputs: 'label' is used twice"),
        ("gates.a", {"kind": "given", "input": "part", "choices": ["a"]},
         "gates and experts: 'a' is used twice"),
        ("rows", "z", "'z' is not one of the inputs x, part"),
        ("rows", "part", "rows: float32 does not represent every INT64 of input 'part'"),
        ("inputs.0.datatype", "FP64", "rows: float32 does not represent every FP64"),
        ("inputs.0.datatype", "INT32", "rows: float32 does not represent every INT32"),
        ("gate", "a", "gate: 'a' is not one of the gates root, left, right"),
        ("gate", "left", "gates.root.choices: 'left' is the root; gates"),
        ("gates.root.choices", ["left", "nothing"], "gates.root.choices: 'nothing' is not a gate"),
        ("gates.root.choices", ["left"], "no path leads from the root 'root' to right, c, d"),
        ("gates.root.choices", ["left", "left"], "choices: 'left' is already a choice of 'root'"),
        ("gates.left.choices", ["a", "b", "right"], "'right' is already a choice of 'root'; gates"),
        ("gates.left.choices", ["a", "root"], "gates.left.choices: 'root' is the root; gates form"),
        ("gates.right.choices", ["a", "c"], "'a' is already a choice of 'left'"),
        ("experts.e", {"kind": "linear", "file": "a.safetensors"}, "no path .* to e"),
        ("gates.root.input", "z", "'z' is not one of the inputs"),
        ("gates.root.input", "part", "gates.root.input: float32 does not represent every INT64"),
        ("gates.root.pool", "mean", "gates.root.pool: mean is for rows of two axes"),
        ("gates.right.input", "x", "gates.right.input: 'x' must be of integers and a fixed shape"),
        ("gates.right.column", 2, "gates.right.column: must be below 2, the values of a row"),
        ("experts.a", {"kind": "rnn", "cell": "gru", "file": "a.safetensors"},
         "experts.a: an rnn takes rows of two axes"),
        ("experts.b.method", "predict", "experts.b.method: predict does not support probabilities"),
        ("outputs.1.from", "value", "outputs.p.from: probabilities has no value; allowed: prob"),
        ("outputs.0.datatype", "INT64", "outputs.label.datatype: label must be BYTES"),
        ("outputs.1.datatype", "INT64", "outputs.p.datatype: probabilities must be FP32 or FP64"),
        ("outputs.2.datatype", "FP32", "outputs.experts.datatype: experts must be INT64"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(path: str, value: Any, words: str) -> None:
    assert refused(document(path, value), words) == ""


def test_a_cycle_apart_from_the_root_and_names_of_keys_are_refused() -> None:
    content = document()
    content["gates"] |= {
        name: {"kind": "given", "input": "part", "choices": [other]} for name, other in ("pq", "qp")
    }
    refused(content, "no path leads from the root 'root' to p, q; gates form a tree")
    content = document("experts.a b", LINEAR)
    refused(content, r"must be a name of letters, digits and \._- \(given: 'a b'\)")
    assert len(refused(document("experts." + "e" * 100_000, {"kind": "linear"}), "required")) < 200


def chain(levels: int) -> Document:
    gates = {
        f"g{i}": {"kind": "given", "input": "part", "choices": [f"g{i + 1}"]}
        for i in range(levels - 1)
    }
    gates[f"g{levels - 1}"] = {"kind": "given", "input": "part", "choices": ["a", "b", "c", "d"]}
    return document("gates", gates) | {"gate": "g0"}


def test_trees_may_be_deep_and_not_bottomless() -> None:
    assert most_experts(parsed(chain(MAX_LEVELS))) == 1
    for levels in (MAX_LEVELS + 1, 1_500):
        assert refused(chain(levels), f"gates: must have at most {MAX_LEVELS} levels$") == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"combine": {"kind": "mean", "shape": [2]}}, "experts.r.returns: sequence does not match"),
        ({"combine": {"kind": "mean", "shape": [4, 2]}}, "a sequence must be as long as its row"),
        ({"combine": {"kind": "mean", "shape": [2, -1]}}, "each axis must be at least 1"),
        ({"experts": {"r": LINEAR}}, "experts.r: only an rnn takes rows of any length"),
        ({"gates": {"root": {**LINEAR, "choices": ["r"]}}},
         "gates.root.pool: flatten is for rows of one length"),
        ({"gates": {"root": {"kind": "given", "input": "x", "choices": ["r"]}}},
         "gates.root.input: 'x' must be of integers"),
    ],
)  # fmt: skip
def test_sequences_that_do_not_fit_are_refused(changes: Document, words: str) -> None:
    refused(sequences(**changes), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "z"}, "'z' is not one of the inputs"),
        ({"target": "x"}, r"combine.target: input 'x' must have the shape \[2\]"),
        ({"target": None}, "outputs.density.from: log_density needs combine.target"),
        ({"deviation": 0}, "greater than 0"),
        ({"deviation": float("inf")}, "finite number"),
        ({"dimensions": 0}, "greater than or equal to 1"),
        ({"dimensions": 1 << 17}, "less than or equal to 65536"),
    ],
)
def test_densities_that_do_not_fit_are_refused(changes: Document, words: str) -> None:
    combine = {"kind": "density", "dimensions": 2, "target": "t", **changes}
    refused(densities(combine=combine), words)
    gate = {**LINEAR, "choices": ["e", "f"], "top_k": 1, "renormalize": False}
    content = densities(gates={"root": gate}, experts={name: dict(LINEAR) for name in "ef"})
    refused(content, "gates.root.renormalize: must be true for a density")


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [("float32", "BOOL"), ("float32", "UINT8"), ("float64", "INT32"), ("float64", "FP32")],
)
def test_datatypes_that_rows_represent_exactly_pass(dtype: str, datatype: str) -> None:
    assert parsed(document("inputs.0.datatype", datatype) | {"dtype": dtype}).dtype == dtype


# The text itself.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("format: 1\ndtype: float32\nformat: 1\n", "in line 3: the key 'format' occurs twice"),
        ("gates: {a: {kind: x, kind: y}}", "in line 1: the key 'kind' occurs twice"),
        ("a: &a [1]\nb: *a\n", r"in line 2: the alias \*a is not allowed"),
        ("a: &a\n  b: *a\n", r"in line 2: the alias \*a is not allowed"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", r"in line 2: the alias \*a is not allowed"),
        ("a: [1, 2", "is not YAML in line 1"),
        ("a: !!python/object/apply:os.system [ls]", "in line 1: could not determine a constructor"),
        ("a: !!bool maybe", "is not YAML: KeyError"),
        ("a: !!int ''", "is not YAML: "),
        ("a: 2020-13-45", "is not YAML: ValueError"),
        ("? {a: b}\n: c\n", "is not YAML in line 1"),
        ("a: \x01", "is not YAML: ReaderError"),
        ("[" * 10_000, "is not YAML: RecursionError"),
        ("--- 1\n--- 2\n", "is not YAML"),
        (b"a: \xff\xfe\xff", "is not YAML"),
        ("", r"must be a mapping \(given: None\)"),
        ("[1, 2]", r"must be a mapping \(given: a list of 2\)"),
    ],
)
def test_text_that_is_no_plain_mapping_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        parse_spec(text.encode() if isinstance(text, str) else text, FILE)
    assert caught.value.field == str(FILE)
