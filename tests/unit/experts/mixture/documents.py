"""A ``mixture.yaml`` with a tree of gates and an expert of every kind, as plain data."""

from __future__ import annotations

import copy
from typing import Any

FILES = ("a.safetensors", "b.skops", "c.onnx", "data/c.bin", "gates.safetensors")
_DOCUMENT: dict[str, Any] = {
    "format": 1,
    "description": "two levels",
    "dtype": "float32",
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [4]},
        {"name": "part", "datatype": "INT64", "shape": [2]},
    ],
    "gate": "root",
    "gates": {
        "root": {
            "kind": "linear", "file": "gates.safetensors", "choices": ["left", "right"],
            "top_k": 1,
        },
        "left": {
            "kind": "mlp", "file": "gates.safetensors", "prefix": "left.", "choices": ["a", "b"],
            "activation": "gelu", "renormalize": False,
        },
        "right": {"kind": "given", "input": "part", "column": 1, "choices": ["c", "d"]},
    },
    "experts": {
        "a": {"kind": "linear", "file": "a.safetensors", "link": "softmax"},
        "b": {"kind": "sklearn", "file": "b.skops", "method": "predict_proba"},
        "c": {"kind": "onnx", "file": "c.onnx", "data": ["data/c.bin"], "output": "probabilities"},
        "d": {"kind": "mlp", "file": "a.safetensors", "prefix": "d.", "link": "softmax"},
    },
    "combine": {"kind": "probabilities", "classes": ["no", "yes"]},
    "outputs": [
        {"name": "label", "datatype": "BYTES", "from": "label"},
        {"name": "p", "datatype": "FP32", "from": "probabilities"},
        {"name": "experts", "datatype": "INT64", "from": "experts"},
    ],
}  # fmt: skip


def document(path: str = "", value: Any = None) -> dict[str, Any]:
    """Return the document with the value at a path replaced; ``...`` removes the key."""
    content = copy.deepcopy(_DOCUMENT)
    if path:
        *parents, last = path.split(".")
        at: Any = content
        for key in parents:
            at = at[int(key)] if isinstance(at, list) else at[key]
        if value is ...:
            del at[last]
        elif isinstance(at, list):
            at[int(last)] = value
        else:
            at[last] = value
    return content


def sequences(**changes: Any) -> dict[str, Any]:
    """Return a document of a recurrent expert over rows of any length."""
    content = {
        "format": 1,
        "dtype": "float64",
        "inputs": [{"name": "x", "datatype": "FP64", "shape": [-1, 3]}],
        "gate": "root",
        "gates": {
            "root": {"kind": "linear", "file": "g.safetensors", "choices": ["r"], "pool": "last"}
        },
        "experts": {
            "r": {"kind": "rnn", "cell": "gru", "file": "r.safetensors", "returns": "sequence"}
        },
        "combine": {"kind": "mean", "shape": [-1, 2]},
        "outputs": [{"name": "y", "datatype": "FP64", "from": "value"}],
    }
    return copy.deepcopy(content) | changes


def densities(**changes: Any) -> dict[str, Any]:
    """Return a document of a mixture of densities with a target."""
    content = {
        "format": 1,
        "dtype": "float64",
        "inputs": [
            {"name": "x", "datatype": "FP64", "shape": [3]},
            {"name": "t", "datatype": "FP64", "shape": [2]},
        ],
        "gate": "root",
        "gates": {"root": {"kind": "linear", "file": "g.safetensors", "choices": ["e"]}},
        "experts": {"e": {"kind": "linear", "file": "e.safetensors"}},
        "combine": {"kind": "density", "dimensions": 2, "target": "t"},
        "outputs": [{"name": "density", "datatype": "FP64", "from": "log_density"}],
    }
    return copy.deepcopy(content) | changes
