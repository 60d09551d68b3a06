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


def refused(mixture: Mixture, place: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        check_mixture(mixture)
    assert caught.value.field == f"{mixture.folder}/{place}"


def test_every_expert_is_loaded_and_its_bytes_returned(tmp_path: Path) -> None:
    experts = {"a": LINEAR, "b": SKLEARN, "c": {**LINEAR, "file": "c.safetensors"}}
    files = {
        "e.safetensors": linear_bytes(),
        "e.skops": dumps(LinearRegression().fit(ROWS, TARGETS)),
        "c.safetensors": linear_bytes(bias=np.ones(2)),
    }
    mixture = save_mixture(tmp_path, content_of(experts, [F], VALUE), files)
    sizes = check_mixture(mixture)
    assert sizes[::2] == [48, 64]
    assert sizes == [load_mixture_expert(mixture, i).num_bytes for i in range(3)]
    # Loading an expert reads no other file.
    files["c.safetensors"] = b"damaged"
    damaged = save_mixture(tmp_path, content_of(experts, [F], VALUE), files)
    (tmp_path / "gate.safetensors").unlink()
    assert load_mixture_expert(damaged, 0).name == "a"
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_mixture_expert(damaged, 2)


# Gates.


@pytest.mark.parametrize(
    ("changes", "tensors", "words"),
    [
        ({}, {"weight": np.ones((3, F))}, r"weight must have the shape \[2, 3\] \(given: \[3, 3\]"),
        ({}, {"weight": np.ones((2, F)), "bias": np.ones(3)}, r"bias must have the shape \[2\]"),
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
    refused(mixture, "gate.safetensors: gates.root", words)


def test_gates_of_every_kind_pass(tmp_path: Path) -> None:
    mlp = {"0.weight": np.ones((5, F)), "0.bias": np.ones(5), "1.weight": np.ones((2, 5))}
    check_mixture(mixture_in(tmp_path, LINEAR, linear_bytes(), gate=save(mlp), kind="mlp"))
    content = content_of({"a": LINEAR, "b": LINEAR}, [F], VALUE)
    content["inputs"].append({"name": "choice", "datatype": "INT64", "shape": [1]})
    content["gates"]["root"] = {"kind": "given", "input": "choice", "choices": ["a", "b"]}
    check_mixture(save_mixture(tmp_path / "given", content, {"e.safetensors": linear_bytes()}))


@pytest.mark.parametrize(("pool", "width"), [("flatten", 6), ("mean", 3), ("last", 3)])
def test_a_gate_may_pool_the_steps_of_a_sequence(tmp_path: Path, pool: str, width: int) -> None:
    right, wrong = (save({"weight": np.ones((2, n))}) for n in (width, width + 1))
    given: dict[str, Any] = {"row_shape": [2, 3], "pool": pool}
    data = save({"weight": np.ones((2, 6))})
    check_mixture(mixture_in(tmp_path, LINEAR, data, gate=right, **given))
    mixture = mixture_in(tmp_path, LINEAR, data, gate=wrong, **given)
    refused(mixture, "gate.safetensors: gates.root", "weight must have the shape")


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
    words = "its first result differs from that of the row by itself"
    mixture = mixture_in(tmp_path, ONNX, model, row_shape=[2])
    refused(mixture, "e.onnx: experts.a", words)


def test_an_expert_need_not_take_every_value_that_is_tried(tmp_path: Path) -> None:
    check_mixture(mixture_in(tmp_path, ONNX, RECIPROCAL, row_shape=[2]))  # NaN at 0
    encoder = make_pipeline(OneHotEncoder(), LinearRegression()).fit(np.zeros((4, F)), TARGETS[:4])
    check_mixture(mixture_in(tmp_path / "encoder", SKLEARN, dumps(encoder)))


def logarithms() -> Any:
    """Return an estimator that fails for the rows that are tried."""
    steps = [FunctionTransformer(np.log), FunctionTransformer(np.log), LinearRegression()]
    return make_pipeline(*steps).fit(np.exp(np.exp(ROWS)), TARGETS)


@pytest.mark.parametrize(
    ("estimator", "method", "words"),
    [
        (LinearRegression().fit(ROWS, TARGETS[:, :1]), "predict",
         r"it fails for 1 rows of shape \[3\]: returns the shape \[1, 1\] for 1 rows, not \["),
        (SVC().fit(ROWS, TARGETS[:, 0] > 0), "decision_function", "returns the shape"),
        (logarithms(), "predict",
         r"it fails for 1 rows of shape \[3\]: ValueError: Input X contains inf"),
        (make_pipeline(LinearRegression()), "predict", ": NotFittedError"),
    ],
)  # fmt: skip
def test_an_expert_that_fails_for_every_row_is_refused_with_its_first_error(
    tmp_path: Path, estimator: Any, method: str, words: str
) -> None:
    part = {**SKLEARN, "method": method}
    with np.errstate(all="ignore"):
        refused(mixture_in(tmp_path, part, dumps(estimator)), "e.skops: experts.a", words)


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
    mixture = mixture_in(tmp_path, LINEAR, data, combine)
    refused(mixture, "e.safetensors: experts.a", words)
    check_mixture(mixture_in(tmp_path, {**LINEAR, "link": "softmax"}, data, combine))
    check_mixture(mixture_in(tmp_path, LINEAR, data, {**combine, "kind": "vote"}))
    estimator = LogisticRegression().fit(ROWS, TARGETS[:, 0] > 0)
    part = {**SKLEARN, "method": "predict_proba"}
    check_mixture(mixture_in(tmp_path, part, dumps(estimator), combine))


def test_standard_deviations_are_positive(tmp_path: Path) -> None:
    combine = {"kind": "density", "dimensions": 1}
    data = linear_bytes(bias=np.array([0.0, -9.0]))
    words = "standard deviations that are not positive"
    refused(mixture_in(tmp_path, LINEAR, data, combine), "e.safetensors: experts.a", words)
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
    words = r"it returns values that are not finite for 1 rows of shape \[3, 3\]$"
    refused(mixture, "e.safetensors: experts.a", words)  # one step is finite
    tensors["rnn.weight_hh_l0"] = np.ones((2, 2))
    check_mixture(mixture_in(tmp_path, part, save(tensors), row_shape=[-1, F]))
