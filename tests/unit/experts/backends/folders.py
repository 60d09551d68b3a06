"""Folders of mixtures with one gate and the experts that a test gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save
from skops.io import dumps

from experts.backends.load import MixtureExpert, load_mixture_expert
from experts.checkpoint.mixture import Mixture, open_mixture

DATATYPES = {"float32": "FP32", "float64": "FP64"}
RTOL = {"float32": 1e-6, "float64": 1e-12}
"""How close predictions are to a library's own, by the mixture's dtype."""


def content_of(
    experts: Mapping[str, Mapping[str, Any]],
    row_shape: Sequence[int],
    combine: Mapping[str, Any],
    dtype: str = "float64",
) -> dict[str, Any]:
    """Return a ``mixture.yaml`` with a linear gate over its experts."""
    source = {"mean": "value", "density": "mean"}.get(combine["kind"], "label")
    datatype = "INT64" if source == "label" else DATATYPES[dtype]
    if source == "label" and isinstance(combine["classes"][0], str):
        datatype = "BYTES"
    pool = {"pool": "mean"} if len(row_shape) == 2 and row_shape[0] == -1 else {}
    return {
        "format": 1,
        "dtype": dtype,
        "inputs": [{"name": "x", "datatype": DATATYPES[dtype], "shape": list(row_shape)}],
        "gate": "root",
        "gates": {
            "root": {
                "kind": "linear", "file": "gate.safetensors", "choices": list(experts), **pool
            }
        },
        "experts": {name: dict(part) for name, part in experts.items()},
        "combine": dict(combine),
        "outputs": [{"name": "y", "datatype": datatype, "from": source}],
    }  # fmt: skip


def save_mixture(folder: Path, content: Mapping[str, Any], files: Mapping[str, bytes]) -> Mixture:
    """Write a mixture and the gate's file, if it is not among ``files``; returns it opened."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mixture.yaml").write_text(yaml.safe_dump(dict(content), sort_keys=False))
    for name, data in {"gate.safetensors": gate_bytes(content), **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return open_mixture(folder)


def gate_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the weights of the root's gate, all equal."""
    shape = content["inputs"][0]["shape"]
    width = shape[-1] if shape[0] == -1 else int(np.prod(shape))
    choices = content["gates"]["root"]["choices"]
    return save({"weight": np.ones((len(choices), width), content["dtype"])})


def linear_files(names: Sequence[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a mixture of linear experts from 3 values to 2, each with a file of its own."""
    parts = {name: {"kind": "linear", "file": f"{name}.safetensors"} for name in names}
    files = {
        part["file"]: save({"weight": np.random.default_rng(i).normal(size=(2, 3))})
        for i, part in enumerate(parts.values())
    }
    return content_of(parts, [3], {"kind": "mean", "shape": [2]}), files


def lone_expert(
    folder: Path,
    part: Mapping[str, Any],
    files: Mapping[str, bytes],
    row_shape: Sequence[int],
    combine: Mapping[str, Any],
    dtype: str = "float64",
) -> MixtureExpert:
    """Return the only expert of a mixture, loaded."""
    content = content_of({"e": part}, row_shape, combine, dtype)
    return load_mixture_expert(save_mixture(folder, content, files), 0)


def sklearn_expert(
    folder: Path, estimator: Any, method: str, combine: Mapping[str, Any], dtype: str = "float64"
) -> MixtureExpert:
    """Return a fitted estimator as the only expert of a mixture."""
    part = {"kind": "sklearn", "file": "e.skops", "method": method}
    files = {"e.skops": dumps(estimator)}
    return lone_expert(folder, part, files, [estimator.n_features_in_], combine, dtype)


def predicted(expert: MixtureExpert, rows: Any) -> np.ndarray:
    """Return an expert's outputs for rows in the mixture's dtype, called as the bank does."""
    outputs = expert(np.asarray(rows, expert.dtype))
    assert outputs.flags.c_contiguous
    assert outputs.dtype == expert.dtype
    return outputs
