"""Mixtures for tests of whole paths: experts of every kind, two levels of gates, sequences.

All weights come from a seed. A mixture's predictions are compared with the libraries' own in
``tests/unit``; tests of whole paths compare with :class:`tests.local_mixture.LocalMixture`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save
from skl2onnx import to_onnx
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVR
from skops.io import dumps

from workshop.estimators.estimators import MixtureOfExpertsRegressor

NUM_FEATURES = 6
FRAGILE_LEVELS = (0.0, 1.0)
"""The values of the first feature that the expert ``fragile`` knows; others make it raise."""


def save_mixture(folder: Path, document: Mapping[str, Any], files: Mapping[str, bytes]) -> Path:
    """Write a mixture's folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mixture.yaml").write_text(yaml.safe_dump(dict(document), sort_keys=False))
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def save_unlike(folder: Path, seed: int = 0, top_k: int = 2) -> Path:
    """Save a weighted mean of eight experts, of every kind that takes vectors, in float64."""
    source = np.random.default_rng(seed)
    rows = source.normal(size=(80, NUM_FEATURES))
    targets = np.stack([rows @ source.normal(size=NUM_FEATURES), np.sin(rows[:, 0] * 3)], axis=1)
    forest = RandomForestRegressor(10, max_depth=4, random_state=seed).fit(rows, targets)
    svr = make_pipeline(StandardScaler(), SVR())
    onnx = to_onnx(Ridge().fit(rows, targets), rows[:1])
    sizes = (NUM_FEATURES, 16, 2)
    mlp = {
        f"{i}.{part}": source.normal(size=shape) * 0.3
        for i in range(2)
        for part, shape in (("weight", (sizes[i + 1], sizes[i])), ("bias", (sizes[i + 1],)))
    }
    linear = {"weight": source.normal(size=(2, NUM_FEATURES)), "bias": source.normal(size=2)}
    files = {
        "gate.safetensors": save({"weight": source.normal(size=(8, NUM_FEATURES))}),
        "forest.skops": dumps(forest),
        "ridge.skops": dumps(make_pipeline(StandardScaler(), Ridge()).fit(rows, targets)),
        "neighbours.skops": dumps(KNeighborsRegressor(3).fit(rows, targets)),
        "svr.skops": dumps(_pairwise(svr, rows, targets)),
        "ridge.onnx": onnx.SerializeToString(),
        "linear.safetensors": save(linear),
        "mlp.safetensors": save(mlp),
        "tanh.safetensors": save({name: -value for name, value in mlp.items()}),
    }
    experts = {
        name.partition(".")[0] if kind != "onnx" else "onnx": {"kind": kind, "file": name, **more}
        for name, kind, more in (
            ("forest.skops", "sklearn", {}),
            ("ridge.skops", "sklearn", {}),
            ("neighbours.skops", "sklearn", {}),
            ("svr.skops", "sklearn", {}),
            ("ridge.onnx", "onnx", {}),
            ("linear.safetensors", "linear", {}),
            ("mlp.safetensors", "mlp", {}),
            ("tanh.safetensors", "mlp", {"activation": "tanh"}),
        )
    }
    gate = {"kind": "linear", "file": "gate.safetensors", "choices": list(experts), "top_k": top_k}
    return save_mixture(folder, _document({"root": gate}, experts), files)


@functools.cache
def fitted_estimator() -> MixtureOfExpertsRegressor:
    """Return a fitted mixture of three unlike regressors, of two outputs; two predict a row."""
    source = np.random.default_rng(9)
    rows = source.normal(size=(90, NUM_FEATURES))
    targets = np.stack([np.abs(rows[:, 0]), rows @ source.normal(size=NUM_FEATURES)], axis=1)
    targets += source.normal(size=targets.shape)
    experts = [
        ("line", Ridge()),
        ("scaled", make_pipeline(StandardScaler(), Ridge(10.0))),
        ("forest", RandomForestRegressor(5, max_depth=3)),
    ]
    estimator = MixtureOfExpertsRegressor(
        experts, top_k=2, cv=None, n_init=1, tol=1e-2, random_state=0
    )
    estimator.fit(rows, targets)
    several = estimator.responsibilities(rows).max(axis=1) < 0.99
    assert several.mean() > 0.5, "several experts predict most rows"
    return estimator


def _pairwise(estimator: Any, rows: np.ndarray, targets: np.ndarray) -> Any:
    from sklearn.multioutput import MultiOutputRegressor

    return MultiOutputRegressor(estimator).fit(rows, targets)


def save_given(folder: Path, num_experts: int = 8, fragile: bool = False) -> Path:
    """Save linear experts that requests choose by the input ``expert``.

    With ``fragile`` the last one raises for a first feature that is not in ``FRAGILE_LEVELS``.
    """
    source = np.random.default_rng(3)
    weights = {f"e{i}.weight": source.normal(size=(2, NUM_FEATURES)) for i in range(num_experts)}
    files = {"experts.safetensors": save(weights)}
    experts: dict[str, Any] = {
        f"e{i}": {"kind": "linear", "file": "experts.safetensors", "prefix": f"e{i}."}
        for i in range(num_experts)
    }
    if fragile:
        rows = source.normal(size=(20, NUM_FEATURES))
        rows[:, 0] = np.resize(FRAGILE_LEVELS, 20)
        rows[:, 1:] = 0
        encoder = OneHotEncoder(handle_unknown="error", sparse_output=False)
        fitted = make_pipeline(encoder, Ridge()).fit(rows, rows[:, :2])
        files["fragile.skops"] = dumps(fitted)
        experts["fragile"] = {"kind": "sklearn", "file": "fragile.skops"}
    gate = {"kind": "given", "input": "expert", "choices": list(experts)}
    return save_mixture(folder, _document({"root": gate}, experts), files)


def save_tree(folder: Path) -> Path:
    """Save two levels of gates over five linear experts: a density with one deviation."""
    source = np.random.default_rng(5)
    names = [f"leaf{i}" for i in range(5)]
    tensors = {f"{name}.weight": source.normal(size=(1, NUM_FEATURES)) for name in names}
    tensors |= {f"{name}.bias": source.normal(size=1) for name in names}
    for gate, choices in (("root", 2), ("left", 2), ("right", 3)):
        tensors[f"{gate}.weight"] = source.normal(size=(choices, NUM_FEATURES))
    file = {"file": "tree.safetensors"}
    gates = {
        "root": {"kind": "linear", **file, "prefix": "root.", "choices": ["left", "right"]},
        "left": {"kind": "linear", **file, "prefix": "left.", "choices": names[:2], "top_k": 1},
        "right": {"kind": "linear", **file, "prefix": "right.", "choices": names[2:], "top_k": 2},
    }
    experts = {name: {"kind": "linear", **file, "prefix": f"{name}."} for name in names}
    document = _document(gates, experts)
    document["inputs"].append({"name": "y", "datatype": "FP64", "shape": [1]})
    document["combine"] = {
        "kind": "density", "dimensions": 1, "deviation": 0.5, "target": "y"
    }  # fmt: skip
    document["outputs"] = [
        {"name": "mean", "datatype": "FP64", "from": "mean"},
        {"name": "variance", "datatype": "FP64", "from": "variance"},
        {"name": "log_density", "datatype": "FP64", "from": "log_density"},
        {"name": "experts", "datatype": "INT64", "from": "experts"},
        {"name": "weights", "datatype": "FP64", "from": "weights"},
    ]
    return save_mixture(folder, document, {"tree.safetensors": save(tensors)})


def save_sequences(folder: Path) -> Path:
    """Save recurrent experts over sequences of any length, in float32: class probabilities."""
    torch.manual_seed(7)
    cells = {"plain": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
    files = {
        f"{cell}.safetensors": save(
            {
                **{f"rnn.{n}": p.detach().numpy() for n, p in kind(3, 8).named_parameters()},
                **{
                    f"head.{n}": p.detach().numpy()
                    for n, p in torch.nn.Linear(8, 4).named_parameters()
                },
            }
        )
        for cell, kind in cells.items()
    }
    files["gate.safetensors"] = save({"weight": torch.randn(3, 3).numpy()})
    experts = {
        cell: {"kind": "rnn", "cell": cell, "file": f"{cell}.safetensors", "link": "softmax"}
        for cell in cells
    }
    gate = {"kind": "linear", "file": "gate.safetensors", "choices": list(cells), "top_k": 2}
    document = _document({"root": gate | {"pool": "mean"}}, experts)
    document |= {
        "dtype": "float32",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "combine": {"kind": "probabilities", "classes": ["up", "down", "wave", "flat"]},
        "outputs": [
            {"name": "class", "datatype": "BYTES", "from": "label"},
            {"name": "probabilities", "datatype": "FP32", "from": "probabilities"},
        ],
    }
    return save_mixture(folder, document, files)


def _document(gates: Mapping[str, Any], experts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mean of two values over the input ``x``, in float64."""
    given = any(gate["kind"] == "given" for gate in gates.values())
    inputs = [{"name": "x", "datatype": "FP64", "shape": [NUM_FEATURES]}]
    if given:
        inputs.append({"name": "expert", "datatype": "INT64", "shape": [1]})
    return {
        "format": 1,
        "dtype": "float64",
        "inputs": inputs,
        "gate": next(iter(gates)),
        "gates": dict(gates),
        "experts": dict(experts),
        "combine": {"kind": "mean", "shape": [2]},
        "outputs": [
            {"name": "value", "datatype": "FP64", "from": "value"},
            {"name": "experts", "datatype": "INT64", "from": "experts"},
        ],
    }
