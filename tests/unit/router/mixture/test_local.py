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
