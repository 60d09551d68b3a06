"""A mixture is checked whole before anything starts, and an error names file and key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder
from sklearn.svm import SVC
from skops.io import dumps

from cluster.errors import CheckpointError
from experts.backends.check import check_mixture
from experts.backends.load import load_mixture_expert
from experts.checkpoint.mixture import Mixture
from tests.unit.experts.backends.folders import content_of, save_mixture

F = 3
VALUE = {"kind": "mean", "shape": [2]}
LINEAR = {"kind": "linear", "file": "e.safetensors"}
SKLEARN = {"kind": "sklearn", "file": "e.skops"}
ROWS = np.random.default_rng(0).normal(size=(30, F))
TARGETS = ROWS[:, :2] @ np.ones((2, 2))


def linear_bytes(**tensors: np.ndarray) -> bytes:
    return save({"weight": np.ones((2, F)), **tensors})


def mixture_in(
    folder: Path,
    part: Mapping[str, Any],
    data: bytes,
    combine: Mapping[str, Any] = VALUE,
    row_shape: list[int] | None = None,
    gate: bytes | None = None,
    **changes: Any,
) -> Mixture:
    """Save a mixture of two experts with one file; ``changes`` replace keys of the root's gate."""
    content = content_of({"a": part, "b": part}, row_shape or [F], combine)
    content["gates"]["root"] |= changes
    files = {part["file"]: data} | ({} if gate is None else {"gate.safetensors": gate})
    return save_mixture(folder, content, files)


def refusal(mixture: Mixture) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check_mixture(mixture)
    return caught.value


def test_every_expert_is_loaded_and_its_bytes_returned(tmp_path: Path) -> None:
    experts = {"a": LINEAR, "b": SKLEARN, "c": {**LINEAR, "file": "c.safetensors"}}
    estimator = LinearRegression().fit(ROWS, TARGETS)
    files = {
        "e.safetensors": linear_bytes(),
        "e.skops": dumps(estimator),
        "c.safetensors": linear_bytes(bias=np.ones(2)),
    }
    mixture = save_mixture(tmp_path, content_of(experts, [F], VALUE), files)
    sizes = check_mixture(mixture)
    assert sizes[0] == 48
    assert sizes[2] == 64
    assert sizes == [load_mixture_expert(mixture, i).num_bytes for i in range(3)]


def test_loading_an_expert_reads_no_other_file(tmp_path: Path) -> None:
    experts = {"a": LINEAR, "b": {**LINEAR, "file": "b.safetensors"}}
    files = {"e.safetensors": linear_bytes(), "b.safetensors": b"damaged"}
    mixture = save_mixture(tmp_path, content_of(experts, [F], VALUE), files)
    (tmp_path / "gate.safetensors").unlink()
    assert load_mixture_expert(mixture, 0).name == "a"
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_mixture_expert(mixture, 1)


# Gates.


@pytest.mark.parametrize(
    ("changes", "tensors", "words"),
    [
        ({}, {"weight": np.ones((3, F))}, r"weight must have the shape \[2, 3\] \(given: \[3, 3\]"),
        ({}, {"weight": np.ones((2, F + 1))}, r"weight must have the shape \[2, 3\]"),
        ({}, {"weight": np.ones((2, F)), "bias": np.ones(3)}, r"bias must have the shape \[2\]"),
        ({}, {"bias": np.ones(2)}, "has no tensor weight"),
        ({}, {"weight": np.ones((2, F), np.int64)}, "weight is I64"),
        ({}, {"weight": np.full((2, F), np.inf)}, "weight has values that are not finite"),
        ({}, {"weight": np.ones((2, F)), "bais": np.ones(2)}, "not used: bais"),
        ({"prefix": "g."}, {"weight": np.ones((2, F))}, r"has no tensor g\.weight"),
        ({"kind": "mlp"}, {"0.weight": np.ones((5, F)), "1.weight": np.ones((2, 4))},
         r"1\.weight must have the shape \[2, 5\]"),
        ({"kind": "mlp"}, {"0.weight": np.ones((5, F))}, r"0\.weight must have the shape \[2, 3\]"),
    ],
)  # fmt: skip
def test_tensors_of_a_gate_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], tensors: dict[str, np.ndarray], words: str
) -> None:
    mixture = mixture_in(tmp_path, LINEAR, linear_bytes(), gate=save(tensors), **changes)
    error = refusal(mixture)
    assert error.field == f"{tmp_path / 'gate.safetensors'}: gates.root"
    with pytest.raises(CheckpointError, match=words):
        check_mixture(mixture)


def test_gates_of_every_kind_pass(tmp_path: Path) -> None:
    mlp = {"0.weight": np.ones((5, F)), "0.bias": np.ones(5), "1.weight": np.ones((2, 5))}
    check_mixture(mixture_in(tmp_path, LINEAR, linear_bytes(), gate=save(mlp), kind="mlp"))
    content = content_of({"a": LINEAR, "b": LINEAR}, [F], VALUE)
    content["inputs"].append({"name": "choice", "datatype": "INT64", "shape": [1]})
    content["gates"]["root"] = {"kind": "given", "input": "choice", "choices": ["a", "b"]}
    check_mixture(save_mixture(tmp_path / "given", content, {"e.safetensors": linear_bytes()}))


@pytest.mark.parametrize(("pool", "width"), [("flatten", 6), ("mean", 3), ("last", 3)])
def test_a_gate_may_pool_the_steps_of_a_sequence(tmp_path: Path, pool: str, width: int) -> None:
    right, wrong = ({"weight": np.ones((2, n))} for n in (width, width + 1))
    data, shape = save({"weight": np.ones((2, 6))}), [2, 3]
    check_mixture(mixture_in(tmp_path, LINEAR, data, row_shape=shape, gate=save(right), pool=pool))
    mixture = mixture_in(tmp_path, LINEAR, data, row_shape=shape, gate=save(wrong), pool=pool)
    assert "weight must have the shape" in refusal(mixture).message


# Experts.


def onnx_bytes(*nodes: Any, outputs: int = 2) -> bytes:
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["N", outputs])],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=9)
    return model.SerializeToString()


ONNX = {"kind": "onnx", "file": "e.onnx"}
AVERAGE = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1)
CENTRED = onnx_bytes(AVERAGE, helper.make_node("Sub", ["x", "mean"], ["y"]))
OVER_ROWS = onnx_bytes(helper.make_node("Softmax", ["x"], ["y"], axis=0))
RECIPROCAL = onnx_bytes(helper.make_node("Log", ["x"], ["logs"]),
                        helper.make_node("Mul", ["x", "logs"], ["y"]))  # fmt: skip


@pytest.mark.parametrize("model", [CENTRED, OVER_ROWS])
def test_a_result_that_depends_on_other_rows_is_refused(tmp_path: Path, model: bytes) -> None:
    error = refusal(mixture_in(tmp_path, ONNX, model, row_shape=[2]))
    assert "its first result differs from that of the row by itself" in error.message
    assert error.field == f"{tmp_path / 'e.onnx'}: experts.a"


def test_an_expert_need_not_take_every_value_that_is_tried(tmp_path: Path) -> None:
    check_mixture(mixture_in(tmp_path, ONNX, RECIPROCAL, row_shape=[2]))  # NaN at 0
    encoder = make_pipeline(OneHotEncoder(), LinearRegression()).fit(np.zeros((4, F)), TARGETS[:4])
    check_mixture(mixture_in(tmp_path / "encoder", SKLEARN, dumps(encoder)))


@pytest.mark.parametrize(
    ("estimator", "targets", "part", "combine", "words"),
    [
        (LinearRegression(), TARGETS[:, :1], {}, VALUE,
         r"it fails for 1 rows of shape \[3\]: returns the shape \[1, 1\] for 1 rows, not \["),
        (SVC(), TARGETS[:, 0] > 0, {"method": "decision_function"}, VALUE, "returns the shape"),
    ],
)  # fmt: skip
def test_an_expert_that_returns_another_shape_is_refused(
    tmp_path: Path, estimator: Any, targets: Any, part: dict[str, Any], combine: Any, words: str
) -> None:
    estimator.fit(ROWS, targets)
    mixture = mixture_in(tmp_path, {**SKLEARN, **part}, dumps(estimator), combine)
    error = refusal(mixture)
    assert error.field == f"{tmp_path / 'e.skops'}: experts.a"
    with pytest.raises(CheckpointError, match=words):
        check_mixture(mixture)


def test_an_expert_that_takes_no_row_is_refused_with_its_first_error(tmp_path: Path) -> None:
    logarithms = [FunctionTransformer(np.log), FunctionTransformer(np.log)]
    estimator = make_pipeline(*logarithms, LinearRegression()).fit(np.exp(np.exp(ROWS)), TARGETS)
    with np.errstate(all="ignore"):
        error = refusal(mixture_in(tmp_path, SKLEARN, dumps(estimator)))
    assert "it fails for 1 rows of shape [3]: ValueError: Input X contains inf" in error.message


def test_an_estimator_that_is_not_fitted_is_refused(tmp_path: Path) -> None:
    error = refusal(mixture_in(tmp_path, SKLEARN, dumps(make_pipeline(LinearRegression()))))
    assert ": NotFittedError" in error.message


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (np.array([[2.0, 0, 0], [-1, 0, 0]]), "negative probabilities"),
        (np.ones((2, F)), "probabilities that do not add up to 1"),
    ],
)
def test_probabilities_are_none_below_0_and_add_up_to_1(
    tmp_path: Path, weight: np.ndarray, words: str
) -> None:
    combine = {"kind": "probabilities", "classes": [0, 1]}
    data = save({"weight": weight})
    assert words in refusal(mixture_in(tmp_path, LINEAR, data, combine)).message
    check_mixture(mixture_in(tmp_path, {**LINEAR, "link": "softmax"}, data, combine))
    check_mixture(mixture_in(tmp_path, LINEAR, data, {**combine, "kind": "vote"}))


def test_probabilities_of_an_estimator_pass(tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(ROWS, TARGETS[:, 0] > 0)
    combine = {"kind": "probabilities", "classes": [0, 1]}
    part = {**SKLEARN, "method": "predict_proba"}
    check_mixture(mixture_in(tmp_path, part, dumps(estimator), combine))


def test_standard_deviations_are_positive(tmp_path: Path) -> None:
    combine = {"kind": "density", "dimensions": 1}
    data = linear_bytes(bias=np.array([0.0, -9.0]))
    error = refusal(mixture_in(tmp_path, LINEAR, data, combine))
    assert "standard deviations that are not positive" in error.message
    check_mixture(mixture_in(tmp_path, LINEAR, linear_bytes(bias=np.ones(2)), combine))
    one = {"kind": "density", "dimensions": 2, "deviation": 0.5}
    check_mixture(mixture_in(tmp_path, LINEAR, data, one))


def test_a_recurrent_expert_is_tried_with_two_lengths(tmp_path: Path) -> None:
    tensors = {
        "rnn.weight_ih_l0": np.ones((2, F)),
        "rnn.bias_ih_l0": np.ones(2),
        "rnn.weight_hh_l0": np.full((2, 2), 1e300),
        "rnn.bias_hh_l0": np.ones(2),
        "head.weight": np.ones((2, 2)),
    }
    part = {"kind": "rnn", "cell": "plain", "nonlinearity": "relu", "file": "e.safetensors"}
    mixture = mixture_in(tmp_path, part, save(tensors), row_shape=[-1, F])
    message = refusal(mixture).message  # one step is finite
    assert message == "it returns values that are not finite for 1 rows of shape [3, 3]"
    tensors["rnn.weight_hh_l0"] = np.ones((2, 2))
    check_mixture(mixture_in(tmp_path, part, save(tensors), row_shape=[-1, F]))
