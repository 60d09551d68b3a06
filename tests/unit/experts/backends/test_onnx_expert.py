"""ONNX experts: onnxruntime's own results, and refusals of what a model must not bring."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from sklearn.base import is_classifier
from sklearn.ensemble import GradientBoostingClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from cluster.errors import CheckpointError, ExpertFailedError
from experts.backends import onnx_file
from experts.backends.load import MixtureExpert
from tests.unit.experts.backends.folders import RTOL, lone_expert, predicted

F = 4
ROWS = np.random.default_rng(0).normal(size=(60, F))
TARGETS = ROWS @ np.arange(1, F + 1)
CLASSES = np.digitize(TARGETS, [-1, 1])
VALUE = {"kind": "mean", "shape": [1]}
VOTE = {"kind": "vote", "classes": [0, 1, 2]}
PROBABILITIES = {"kind": "probabilities", "classes": [0, 1, 2]}
TYPES = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


def onnx_expert(
    folder: Path,
    model: bytes,
    combine: Mapping[str, Any],
    dtype: str = "float32",
    files: Mapping[str, bytes] | None = None,
    row_shape: Sequence[int] = (F,),
    **part: Any,
) -> MixtureExpert:
    """Load ``m/e.onnx`` as the only expert of a mixture."""
    part = {"kind": "onnx", "file": "m/e.onnx", **part}
    return lone_expert(
        folder, part, {"m/e.onnx": model, **(files or {})}, row_shape, combine, dtype
    )


def own_results(model: bytes, output: str, rows: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    results: np.ndarray = session.run([output], {session.get_inputs()[0].name: rows})[0]
    return results


@pytest.mark.parametrize(
    ("estimator", "dtype"),
    [
        (LinearRegression(), "float32"),
        (LinearRegression(), "float64"),
        (RandomForestRegressor(5), "float32"),
        (MLPRegressor(max_iter=20), "float64"),
        (make_pipeline(StandardScaler(), SVR()), "float32"),
        (LogisticRegression(), "float32"),
        (LogisticRegression(), "float64"),
        (GradientBoostingClassifier(n_estimators=3), "float32"),
        (MLPClassifier(max_iter=20), "float64"),
        (SVC(), "float32"),
    ],
)
def test_converted_estimators_give_the_librarys_results(
    tmp_path: Path, estimator: Any, dtype: str
) -> None:
    classifies = is_classifier(estimator)
    estimator.fit(ROWS, CLASSES if classifies else TARGETS)
    options = {"options": {id(estimator): {"zipmap": False}}} if classifies else {}
    rows = ROWS.astype(dtype)
    model = to_onnx(estimator, rows[:1], **options).SerializeToString()
    cases = [("variable", VALUE)]
    if classifies:
        cases = [("label", VOTE), ("probabilities", PROBABILITIES)]
    for output, combine in cases:
        expert = onnx_expert(tmp_path, model, combine, dtype, output=output)
        for count in (0, 1, 2, 33):
            ours = predicted(expert, rows[:count])
            assert ours.shape == (count, 3 if classifies else 1)
            if not count:
                continue
            own = own_results(model, output, rows[:count])
            if output == "label":
                np.testing.assert_array_equal(ours, np.eye(3)[own])
            else:
                np.testing.assert_allclose(ours, own, rtol=RTOL[dtype])


# Models made by hand.


def model_of(
    nodes: Sequence[Any],
    initializers: Sequence[Any] = (),
    *,
    dtype: str = "float32",
    inputs: Sequence[tuple[str, int, Sequence[Any]]] | None = None,
    outputs: Sequence[tuple[str, int, Sequence[Any]]] | None = None,
    domains: Sequence[str] = (),
    functions: Sequence[Any] = (),
) -> Any:
    """Return a model from ``x`` [N, F] to ``y`` [N, 2], or of other inputs and outputs."""
    inputs = inputs or [("x", TYPES[dtype], ["N", F])]
    outputs = outputs or [("y", TYPES[dtype], ["N", 2])]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*given) for given in inputs],
        [helper.make_tensor_value_info(*output) for output in outputs],
        initializers,
    )
    imports = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=9)


def weights(dtype: str = "float32") -> np.ndarray:
    return np.arange(2 * F, dtype=dtype).reshape(F, 2)


def product(weight: Any = None) -> Any:
    """Return the model of x times weights."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return model_of(nodes, [weight or numpy_helper.from_array(weights(), "w")])


def external(name: str, shape: Sequence[int], **entries: Any) -> Any:
    """Return a tensor of float32 in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


TWO = {"kind": "mean", "shape": [2]}
PADDED = b"\0" * 8 + weights().tobytes() + b"\1" * 5


def with_data(folder: Path, model: bytes, data: bytes | None = None) -> MixtureExpert:
    """Load a model with the file of its weights, or with other data in it."""
    files = {"m/w.bin": weights().tobytes() if data is None else data}
    return onnx_expert(folder, model, TWO, files=files, data=["m/w.bin"])


def check_product(expert: MixtureExpert) -> None:
    rows = ROWS.astype(np.float32)
    np.testing.assert_allclose(predicted(expert, ROWS), rows @ weights(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "entries"),
    [
        (weights().tobytes(), {"location": "w.bin"}),
        (PADDED, {"location": "w.bin", "offset": 8, "length": 32, "checksum": "any"}),
        (b"\0" * 8 + weights().tobytes(), {"location": "w.bin", "offset": 8}),
    ],
)
def test_external_data_comes_from_listed_files_beside_the_model(
    tmp_path: Path, data: bytes, entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = product(external("w", [F, 2], **entries)).SerializeToString()
    monkeypatch.chdir(tmp_path)  # there is no w.bin here
    check_product(with_data(tmp_path / "f", model, data))


def in_branch(node: Any, domains: Sequence[str] = ()) -> Any:
    """Return a model whose weights are those of an operator in a branch of another."""
    value = helper.make_tensor_value_info("c", TensorProto.FLOAT, [F, 2])
    branch = helper.make_graph([node], "branch", [], [value])
    condition = helper.make_tensor("t", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("Constant", [], ["condition"], value=condition),
        helper.make_node("If", ["condition"], ["w"], then_branch=branch, else_branch=branch),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return model_of(nodes, domains=domains)


def in_function(node: Any, domains: Sequence[str] = ()) -> Any:
    """Return a model whose weights are those of an operator in a function of the model."""
    imports = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    function = helper.make_function("mine", "Weights", [], ["c"], [node], imports)
    nodes = [
        helper.make_node("Weights", [], ["w"], domain="mine"),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return model_of(nodes, domains=["mine", *domains], functions=[function])


def constant(tensor: Any) -> Any:
    return helper.make_node("Constant", [], ["c"], value=tensor)


PLACES: dict[str, Callable[[Any], Any]] = {
    "initializer": product,
    "branch": lambda tensor: in_branch(constant(tensor)),
    "function": lambda tensor: in_function(constant(tensor)),
}


@pytest.mark.parametrize("place", PLACES)
def test_tensors_are_found_wherever_they_are(tmp_path: Path, place: str) -> None:
    model = PLACES[place](external("w", [F, 2], location="w.bin")).SerializeToString()
    check_product(with_data(tmp_path, model))
    with pytest.raises(CheckpointError, match=r"tensor w is in the file 'w\.bin', which data"):
        onnx_expert(tmp_path, model, TWO, files={"m/w.bin": weights().tobytes()})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "../m/w.bin", "/etc/passwd", "other.bin", "", "./../m/w.bin",
     "*/_ORT_MEM_ADDR_/*"],
)  # fmt: skip
def test_external_data_outside_the_listed_files_is_refused(
    tmp_path: Path, place: str, location: str
) -> None:
    (tmp_path / "secret.bin").write_bytes(weights().tobytes())
    model = PLACES[place](external("w", [F, 2], location=location)).SerializeToString()
    with pytest.raises(CheckpointError, match="which data does not list") as caught:
        with_data(tmp_path, model)
    assert caught.value.field == f"{tmp_path / 'm/e.onnx'}: experts.e.data"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offset": 8}, "onnxruntime refuses it"),
        ({"offset": 0, "length": 33}, "is beyond the 32 bytes of m/w.bin"),
        ({"offset": -1}, "is beyond the 32 bytes"),
        ({"offset": 33}, "is beyond the 32 bytes"),
        ({"offset": "x"}, "is beyond the 32 bytes"),
        ({"length": -1}, "is beyond the 32 bytes"),
        ({"basepath": "/etc"}, "which data does not list"),
        (None, r"no tensor is in m/w\.bin"),
    ],
)
def test_wrong_places_in_external_data_are_refused(
    tmp_path: Path, entries: dict[str, Any] | None, words: str
) -> None:
    tensor = None if entries is None else external("w", [F, 2], location="w.bin", **entries)
    with pytest.raises(CheckpointError, match=words):
        with_data(tmp_path, product(tensor).SerializeToString())


@pytest.mark.parametrize("domain", ["com.mine", "com.microsoft", "ai.onnx.contrib"])
def test_operators_of_other_domains_are_refused_by_name(tmp_path: Path, domain: str) -> None:
    alone = model_of([helper.make_node("Mine", ["x"], ["y"], domain=domain)], domains=[domain])
    node = helper.make_node("Mine", [], ["c"], domain=domain)
    for model in (alone, in_branch(node, [domain]), in_function(node, [domain])):
        with pytest.raises(CheckpointError, match=f"outside ONNX: {domain}.Mine"):
            onnx_expert(tmp_path, model.SerializeToString(), TWO)


def doubled(**shapes: Any) -> bytes:
    """Return a model of y = x + x."""
    node = helper.make_node("Add", ["x", "x"], ["y"])
    return model_of([node], **{"inputs": [IN], "outputs": [OUT], **shapes}).SerializeToString()


def test_a_model_of_doubles_takes_rows_of_floats_but_not_the_other_way(tmp_path: Path) -> None:
    model = doubled(inputs=[("x", DOUBLE, ["N", F])], outputs=[("y", DOUBLE, ["N", F])])
    expert = onnx_expert(tmp_path, model, SAME)
    np.testing.assert_array_equal(predicted(expert, ROWS), 2 * ROWS.astype(np.float32))
    with pytest.raises(CheckpointError, match=r"tensor\(float\), which does not represent every"):
        onnx_expert(tmp_path, doubled(), SAME, "float64")


FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64


@pytest.mark.parametrize(
    ("row_shape", "axes"), [([2, 3], ["N", 2, 3]), ([2, 3], ["N", 6]), ([6], [None, "F"])]
)
def test_rows_of_several_axes_are_given_as_they_are_or_flattened(
    tmp_path: Path, row_shape: list[int], axes: list[Any]
) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("ReduceSum", ["flat", "axes"], ["y"], keepdims=0),
    ]
    model = model_of(
        nodes,
        [numpy_helper.from_array(np.array([1]), "axes")],
        inputs=[("x", FLOAT, axes)],
        outputs=[("y", FLOAT, ["N"])],
    )
    expert = onnx_expert(tmp_path, model.SerializeToString(), VALUE, row_shape=row_shape)
    rows = np.arange(12.0).reshape(2, *row_shape)
    assert predicted(expert, rows).tolist() == [[15.0], [51.0]]


def test_text_labels_vote(tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(ROWS, np.array(["a", "b", "c"])[CLASSES])
    model = to_onnx(
        estimator, ROWS[:1].astype(np.float32), options={id(estimator): {"zipmap": False}}
    ).SerializeToString()
    combine = {"kind": "vote", "classes": ["c", "b", "a"]}
    votes = predicted(onnx_expert(tmp_path, model, combine, output="label"), ROWS)
    labels = [combine["classes"][place] for place in votes.argmax(1)]
    assert labels == estimator.predict(ROWS.astype(np.float32)).tolist()
    expert = onnx_expert(tmp_path, model, {**combine, "classes": ["b", "a"]}, output="label")
    with pytest.raises(ExpertFailedError, match="the label 'c' is not one of"):
        predicted(expert, ROWS)


IN, OUT = ("x", FLOAT, ["N", F]), ("y", FLOAT, ["N", F])


SAME = {"kind": "mean", "shape": [F]}


@pytest.mark.parametrize(
    ("shapes", "part", "key", "words"),
    [
        ({"inputs": [("x", FLOAT, [1, F])]}, {}, "input", r"shape \[1, 4\]; must be any number"),
        ({"inputs": [("x", FLOAT, ["N", 5])]}, {}, "input", r"each of \[4\], or flattened"),
        ({"inputs": [("x", FLOAT, ["N", 2, 2])]}, {}, "input", r"each of \[4\], or flattened"),
        ({"inputs": [("x", FLOAT, [])]}, {}, "input", r"has the shape \[\]"),
        ({"inputs": [("x", INT64, ["N", F])], "outputs": [("y", INT64, ["N", F])]}, {}, "input",
         r"is tensor\(int64\); must be tensor\(float\) or tensor\(double\)"),
        ({}, {"input": "z"}, "input", r"must be one of x \(given: z\)"),
        ({}, {"output": "z"}, "output", r"must be one of y \(given: z\)"),
        ({"inputs": [IN, ("z", FLOAT, ["N"])]}, {}, "input", "must be one of x, z, since the"),
        ({"inputs": [IN, ("z", FLOAT, ["N"])]}, {"input": "x"}, "input", "also needs other inputs"),
        ({"outputs": [OUT, ("x", FLOAT, ["N", F])]}, {}, "output", "must be one of y, x, since"),
    ],
)  # fmt: skip
def test_inputs_and_outputs_that_do_not_fit_are_refused(
    tmp_path: Path, shapes: dict[str, Any], part: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        onnx_expert(tmp_path, doubled(**shapes), SAME, **part)
    assert caught.value.field == f"{tmp_path / 'm/e.onnx'}: experts.e.{key}"


def test_a_classifier_with_zipmap_is_refused(tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(ROWS, CLASSES)
    model = to_onnx(estimator, ROWS[:1].astype(np.float32)).SerializeToString()
    with pytest.raises(CheckpointError, match="a classifier is converted without ZipMap"):
        onnx_expert(tmp_path, model, PROBABILITIES, output="output_probability")
    with pytest.raises(CheckpointError, match="or labels under vote"):
        onnx_expert(tmp_path, model, PROBABILITIES, output="output_label")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xff not a model", "is not an ONNX model"),
        (product().SerializeToString()[:-20], "is not an ONNX model"),
        (onnx.ModelProto(ir_version=9).SerializeToString(), "with a graph of operators"),
        (model_of([helper.make_node("NoSuch", ["x"], ["y"])]).SerializeToString(),
         "onnxruntime refuses it: .*NoSuch"),
    ],
)  # fmt: skip
def test_other_bytes_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        onnx_expert(tmp_path, data, TWO)
    assert caught.value.field == f"{tmp_path / 'm/e.onnx'}: experts.e"


def test_a_model_that_is_longer_than_a_message_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "MAX_MODEL_BYTES", 100)
    model = product(external("w", [F, 2], location="w.bin")).SerializeToString()
    words = f"has {len(model) + 90} bytes with its external data; at"
    with pytest.raises(CheckpointError, match=words):
        with_data(tmp_path, model, bytes(90))


def test_an_error_while_it_computes_fails_the_rows(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    shape = numpy_helper.from_array(np.array([-1, 3]), "shape")
    model = model_of(nodes, [shape], outputs=[("y", FLOAT, ["M", 3])]).SerializeToString()
    expert = onnx_expert(tmp_path, model, {"kind": "mean", "shape": [3]})
    with pytest.raises(ExpertFailedError, match="Reshape") as caught:
        predicted(expert, ROWS[:1])
    assert caught.value.field == "e"
    with pytest.raises(ExpertFailedError, match=r"returns the shape \[4, 3\] for 3 rows"):
        predicted(expert, ROWS[:3])


def test_without_the_extra_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] in ("onnx", "onnxruntime"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("experts.backends.onnx_expert", "experts.backends.onnx_file"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(CheckpointError, match=r"needs onnxruntime and onnx .* expertmesh\[onnx\]"):
        onnx_expert(tmp_path, b"model", TWO)
