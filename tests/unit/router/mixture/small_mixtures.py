"""Small mixtures in folders: gates with random tensors, and experts whose files are never read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from experts.checkpoint.mixture import Mixture, open_mixture

Tensors = Mapping[str, np.ndarray]
VALUE = {"kind": "mean", "shape": [2]}
OUTPUTS = [
    {"name": "value", "datatype": "FP64", "from": "value"},
    {"name": "experts", "datatype": "INT64", "from": "experts"},
    {"name": "weights", "datatype": "FP64", "from": "weights"},
]


def document(gates: Mapping[str, Any], num_experts: int, **changes: Any) -> dict[str, Any]:
    """Return a ``mixture.yaml`` with the experts ``e0``, ``e1`` …; ``changes`` replace its keys."""
    experts = {f"e{i}": {"kind": "linear", "file": "experts.bin"} for i in range(num_experts)}
    whole = {
        "format": 1,
        "dtype": "float64",
        "inputs": [{"name": "x", "datatype": "FP64", "shape": [3]}],
        "gate": next(iter(gates)),
        "gates": dict(gates),
        "experts": experts,
        "combine": VALUE,
        "outputs": OUTPUTS,
    }
    return whole | changes


def mixture_in(folder: Path, spec: Mapping[str, Any], tensors: Tensors | None = None) -> Mixture:
    """Save ``tensors`` as ``gates.safetensors`` beside ``mixture.yaml``; open the folder."""
    (folder / "mixture.yaml").write_text(yaml.safe_dump(dict(spec), sort_keys=False))
    (folder / "experts.bin").write_bytes(b"never read")
    if tensors is not None:
        save_file(
            {name: np.ascontiguousarray(t) for name, t in tensors.items()},
            folder / "gates.safetensors",
        )
    return open_mixture(folder)


def linear_gate(choices: list[str], prefix: str = "", **more: Any) -> dict[str, Any]:
    return {
        "kind": "linear", "file": "gates.safetensors", "prefix": prefix, "choices": choices, **more
    }  # fmt: skip
