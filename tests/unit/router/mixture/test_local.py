"""Mixtures in one process against their libraries' own predictions, put together by loops.

Dimension letters: T rows, F inputs, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.svm import SVC, SVR
from skops.io import dumps
from torch import nn
from torch.nn import functional

from cluster.errors import ExpertFailedError
from experts.checkpoint.mixture import Mixture
from tests.local_mixture import LocalMixture
from tests.unit.experts.backends.folders import RTOL, save_mixture
from tests.unit.router.mixture.small_mixtures import leaves, linear_gate

DATATYPES = {"float32": "FP32", "float64": "FP64"}
TREE: dict[str, Any] = {
    "root": linear_gate(["a", "e3", "b"], "root.", top_k=2),
    "a": linear_gate(["e0", "e1"], "a."),
    "b": linear_gate(["e2"], "b."),
}
"""A row has two or three experts."""


def regression(folder: Path, dtype: str) -> tuple[Mixture, Any, dict[str, np.ndarray], np.ndarray]:
    """Return a mixture over diabetes data, its experts' own predictions, its gates, its rows."""
    x, y = load_diabetes(return_X_y=True)
    x = x.astype(dtype)
    rng = np.random.default_rng(0)
    line, machine = LinearRegression().fit(x, y), SVR(C=50).fit(x, y)
    network = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    flat = {f"{i}.{n}": p for i, m in enumerate(network[::2]) for n, p in m.named_parameters()}
    weight, bias = rng.standard_normal((1, 10)), rng.standard_normal(1)
    gates = {
        f"{name}.weight": 9 * rng.standard_normal((len(gate["choices"]), 10))
        for name, gate in TREE.items()
    }
    experts = {
        "e0": {"kind": "sklearn", "file": "line.skops"},
        "e1": {"kind": "sklearn", "file": "machine.skops"},
        "e2": {"kind": "mlp", "file": "nets.safetensors", "prefix": "m.", "activation": "tanh"},
        "e3": {"kind": "linear", "file": "nets.safetensors", "prefix": "l."},
    }
    nets = {f"m.{name}": p.detach().numpy() for name, p in flat.items()}
    nets |= {"l.weight": weight, "l.bias": bias}
    tensors = {"gates.safetensors": gates, "nets.safetensors": nets}
    files = {
        name: save({key: t.astype(dtype) for key, t in part.items()})
        for name, part in tensors.items()
    }
    files |= {"line.skops": dumps(line), "machine.skops": dumps(machine)}
    spec = {
        "format": 1,
        "dtype": dtype,
        "inputs": [{"name": "x", "datatype": DATATYPES[dtype], "shape": [10]}],
        "gate": "root",
        "gates": TREE,
        "experts": experts,
        "combine": {"kind": "mean", "shape": [1]},
        "outputs": [
            {"name": "y", "datatype": DATATYPES[dtype], "from": "value"},
            {"name": "experts", "datatype": "INT64", "from": "experts"},
        ],
    }

    def stored(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(dtype).astype(float))

    def own(expert_id: int, row: np.ndarray) -> float:
        if expert_id < 2:
            return float((line, machine)[expert_id].predict(row[None])[0])
        tensor = torch.from_numpy(row.astype(float))
        if expert_id == 3:
            return float(functional.linear(tensor, stored(weight), stored(bias)))
        layers = [(stored(nets[f"m.{i}.weight"]), stored(nets[f"m.{i}.bias"])) for i in range(2)]
        hidden = torch.tanh(functional.linear(tensor, *layers[0]))
        return float(functional.linear(hidden, *layers[1]))

    kept = {name: t.astype(dtype).astype(float) for name, t in gates.items()}
    return save_mixture(folder, spec, files), own, kept, x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tree_of_mixed_experts_is_the_product_rule_over_the_libraries_own_predictions(
    tmp_path: Path, dtype: str
) -> None:
    mixture, own, gates, x = regression(tmp_path, dtype)
    outputs = LocalMixture(mixture).predict({"x": x})
    assert list(outputs) == ["y", "experts"]
    assert outputs["y"].dtype == np.dtype(dtype)
    expected = np.zeros((len(x), 1))
    for row, (values, ids) in enumerate(zip(x, outputs["experts"].tolist(), strict=True)):
        shares = leaves(TREE, gates, values.astype(float), [])
        assert [e for e in ids if e >= 0] == sorted(shares)
        expected[row] = sum(weight * own(e, values) for e, weight in shares.items())
    np.testing.assert_allclose(outputs["y"], expected, RTOL[dtype], RTOL[dtype])
    assert {ids.count(-1) for ids in outputs["experts"].tolist()} == {0, 1}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows_are_those_of_many(tmp_path: Path, count: int) -> None:
    mixture, _, _, x = regression(tmp_path, "float64")
    local = LocalMixture(mixture)
    whole = local.predict({"x": x})
    for begin in (0, 100, 300):
        part = local.predict({"x": x[begin : begin + count]}, ["y"])
        assert part["y"].shape == (count, 1)
        np.testing.assert_allclose(part["y"], whole["y"][begin : begin + count], 1e-12)


@pytest.mark.parametrize("kind", ["probabilities", "vote"])
def test_classifiers_are_combined_by_the_gates_weights(tmp_path: Path, kind: str) -> None:
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    logistic = LogisticRegression(max_iter=500).fit(x, names[y])
    # This one has never seen the first class.
    machine = SVC(probability=kind == "probabilities", random_state=0).fit(x[50:], names[y[50:]])
    method = "predict_proba" if kind == "probabilities" else "predict"
    source = "probabilities" if kind == "probabilities" else "votes"
    gate = np.random.default_rng(1).standard_normal((2, 4))
    gates = {"root": linear_gate(["e0", "e1"], "root.")}
    spec = {
        "format": 1,
        "dtype": "float64",
        "inputs": [{"name": "x", "datatype": "FP64", "shape": [4]}],
        "gate": "root",
        "gates": gates,
        "experts": {
            f"e{i}": {"kind": "sklearn", "file": f"{i}.skops", "method": method} for i in range(2)
        },
        "combine": {"kind": kind, "classes": names.tolist()},
        "outputs": [
            {"name": "parts", "datatype": "FP64", "from": source},
            {"name": "label", "datatype": "BYTES", "from": "label"},
        ],
    }
    files = {"gates.safetensors": save({"root.weight": gate})}
    files |= {"0.skops": dumps(logistic), "1.skops": dumps(machine)}
    outputs = LocalMixture(save_mixture(tmp_path, spec, files)).predict({"x": x})
    for row, values in enumerate(x):
        total = np.zeros(3)
        for e, weight in leaves(gates, {"root.weight": gate}, values, []).items():
            expert = (logistic, machine)[e]
            if kind == "vote":
                total[names.tolist().index(expert.predict(values[None])[0])] += weight
            else:
                total[e:] += weight * expert.predict_proba(values[None])[0]
        np.testing.assert_allclose(outputs["parts"][row], total, 1e-10, 1e-14)
        assert outputs["label"][row, 0] == names[np.argmax(total)]


def test_recurrent_experts_return_sequences_of_the_rows_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = [nn.ModuleDict({"rnn": nn.GRU(3, 5, batch_first=True), "head": nn.Linear(5, 2)})
            for _ in range(2)]  # fmt: skip
    tensors = {
        f"{i}.{name}": p.detach().numpy()
        for i, net in enumerate(nets)
        for name, p in net.named_parameters()
    }
    spec = {
        "format": 1,
        "dtype": "float32",
        "inputs": [
            {"name": "s", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "c", "datatype": "INT32", "shape": [1]},
        ],
        "gate": "root",
        "gates": {"root": {"kind": "given", "input": "c", "choices": ["e1", "e0"]}},
        "experts": {
            f"e{i}": {"kind": "rnn", "file": "r.safetensors", "prefix": f"{i}.", "cell": "gru",
                      "returns": "sequence"}
            for i in range(2)
        },
        "combine": {"kind": "mean", "shape": [-1, 2]},
        "outputs": [{"name": "y", "datatype": "FP32", "from": "value"}],
    }  # fmt: skip
    files = {"r.safetensors": save(tensors)}
    local = LocalMixture(_without_gate(tmp_path, spec, files))
    for steps in (1, 6):
        s = torch.randn(5, steps, 3)
        column = np.array([[0], [1], [1], [0], [1]], np.int32)
        got = local.predict({"s": s.numpy(), "c": column})["y"]
        assert got.shape == (5, steps, 2)
        for row in range(5):
            net = nets[1 - int(column[row, 0])]
            with torch.inference_mode():
                expected = net["head"](net["rnn"](s[row : row + 1])[0])[0]
            np.testing.assert_allclose(got[row], expected, 1e-5, 1e-6)
    assert local.predict({"s": s.numpy()[:0], "c": column[:0]})["y"].shape == (0, 6, 2)


def _without_gate(folder: Path, spec: dict[str, Any], files: dict[str, bytes]) -> Mixture:
    return save_mixture(folder, spec, {"gate.safetensors": b"unused"} | files)


def density(folder: Path) -> Mixture:
    """Return a mixture of two densities whose second deviation is the second input's value."""
    weight = np.array([[1.0, 0.0], [0.0, 1.0]])
    experts = {
        f"e{i}": {"kind": "linear", "file": "e.safetensors", "prefix": f"{i}."} for i in range(2)
    }
    spec = {
        "format": 1,
        "dtype": "float64",
        "inputs": [
            {"name": "x", "datatype": "FP64", "shape": [2]},
            {"name": "t", "datatype": "FP64", "shape": [1]},
        ],
        "gate": "root",
        "gates": {"root": linear_gate(["e0", "e1"])},
        "experts": experts,
        "combine": {"kind": "density", "dimensions": 1, "target": "t"},
        "outputs": [
            {"name": "mean", "datatype": "FP64", "from": "mean"},
            {"name": "log", "datatype": "FP64", "from": "log_density"},
        ],
    }
    files = {
        "gates.safetensors": save({"weight": np.zeros((2, 2))}),
        "e.safetensors": save({"0.weight": weight, "1.weight": 3 * weight}),
    }
    return save_mixture(folder, spec, files)


def test_a_density_needs_its_target_for_its_logarithm_alone(tmp_path: Path) -> None:
    local = LocalMixture(density(tmp_path))
    x = np.array([[1.0, 2.0]])
    assert local.predict({"x": x})["mean"].tolist() == [[2.0]]
    both = local.predict({"x": x, "t": np.array([[1.0]])})
    assert list(both) == ["mean", "log"]
    tall, wide = (np.exp(-0.5 * ((1 - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
                  for m, s in ((1, 2), (3, 6)))  # fmt: skip
    np.testing.assert_allclose(both["log"], [[np.log(0.5 * tall + 0.5 * wide)]], 1e-14)
    with pytest.raises(ExpertFailedError, match=r"e0: a deviation must be above 0 \(row 1"):
        local.predict({"x": np.array([[1.0, 2.0], [1.0, -2.0]])})
