"""Small mixtures in folders, and the choice of their gates written out row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from safetensors.numpy import save

from experts.checkpoint.mixture import Mixture
from experts.checkpoint.stored import RemoteFiles
from experts.mixture.spec import MixtureSpec
from router.moe.gate import Choice

Tensors = Mapping[str, np.ndarray]
Leaves = dict[int, float]
"""The weights of one row's experts."""
VALUE = {"kind": "mean", "shape": [2]}
OUTPUTS = [
    {"name": "value", "datatype": "FP64", "from": "value"},
    {"name": "experts", "datatype": "INT64", "from": "experts"},
    {"name": "weights", "datatype": "FP64", "from": "weights"},
]


def document(gates: Mapping[str, Any], num_experts: int, **changes: Any) -> dict[str, Any]:
    """Return a ``mixture.yaml`` with the experts ``e0``, ``e1`` …; ``changes`` replace its keys.

    The first of the gates is the root. Rows are three numbers ``x`` and two integers ``column``.
    """
    datatype = "FP32" if changes.get("dtype") == "float32" else "FP64"
    experts = {f"e{i}": {"kind": "linear", "file": "experts.bin"} for i in range(num_experts)}
    whole = {
        "format": 1,
        "dtype": "float64",
        "inputs": [
            {"name": "x", "datatype": datatype, "shape": [3]},
            {"name": "column", "datatype": "INT64", "shape": [2]},
        ],
        "gate": next(iter(gates)),
        "gates": dict(gates),
        "experts": experts,
        "combine": VALUE,
        "outputs": OUTPUTS,
    }
    return whole | changes


def mixture_of(spec: Mapping[str, Any], tensors: Tensors) -> Mixture:
    """Return a mixture without a folder, with ``tensors`` as ``gates.safetensors``.

    Floating-point tensors get the mixture's dtype.
    """
    dtypes = {"f": spec["dtype"], "i": "int64"}
    stored = {name: t.astype(dtypes[t.dtype.kind], order="C") for name, t in tensors.items()}
    files = {"gates.safetensors": save(stored)}
    remote = cast(RemoteFiles, SimpleNamespace(tensor=files.__getitem__))
    return Mixture(Path(), {}, {}, MixtureSpec.model_validate(spec), remote=remote)


def linear_gate(choices: Sequence[str], prefix: str = "", **more: Any) -> dict[str, Any]:
    file = {"file": "gates.safetensors", "prefix": prefix}
    return {"kind": "linear", "choices": list(choices), **file, **more}


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def can_reach(
    gates: Mapping[str, Any], name: str, allowed: Sequence[bool], given: Sequence[int]
) -> bool:
    """Return whether a row with ``given`` integers can come from a choice to an allowed expert."""
    if name not in gates:
        return bool(allowed[int(name[1:])])
    gate = gates[name]
    choices = gate["choices"]
    if gate["kind"] == "given":
        choices = [choices[given[gate.get("column", 0)]]]
    return any(can_reach(gates, choice, allowed, given) for choice in choices)


def leaves(
    gates: Mapping[str, Any],
    tensors: Tensors,
    x: np.ndarray,
    given: Sequence[int],
    allowed: Sequence[bool] | None = None,
) -> Leaves:
    """Return the experts of one row and their weights by the product rule, gate after gate.

    All gates are linear, with the prefix of their own name, or given. Experts have the names of
    :func:`document`.
    """
    found: Leaves = {}

    def descend(name: str, weight: float) -> None:
        if name not in gates:
            found[int(name[1:])] = weight
            return
        gate = gates[name]
        choices = gate["choices"]
        fits = [allowed is None or can_reach(gates, choice, allowed, given) for choice in choices]
        left = [place for place, is_left in enumerate(fits) if is_left]
        if gate["kind"] == "given":
            column = given[gate.get("column", 0)]
            if column in left:
                descend(choices[column], weight)
            return
        if not left:
            return
        scores = tensors[f"{name}.weight"] @ x + tensors.get(f"{name}.bias", 0.0)
        shares = dict(zip(left, softmax(scores[left]), strict=True))
        best = sorted(left, key=lambda place: (-scores[place], place))
        best = best[: gate.get("top_k", len(choices))]
        total = sum(shares[p] for p in best) if gate.get("renormalize", True) else 1.0
        for place in best:
            descend(choices[place], weight * shares[place] / total)

    descend(next(iter(gates)), 1.0)
    return found


def pairs_of(choice: Choice) -> list[Leaves]:
    """Return the pairs of a choice, row by row, in their order."""
    served = choice.served()
    return [
        {int(e): float(w) for e, w, is_pair in zip(ids, weights, row, strict=True) if is_pair}
        for ids, weights, row in zip(choice.ids, choice.weights.numpy(), served, strict=True)
    ]
