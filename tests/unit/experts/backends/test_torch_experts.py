"""Experts of torch architectures: torch's own results, and the same bits for a row in any batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cluster.errors import CheckpointError
from experts.backends.load import MixtureExpert, load_mixture_expert
from tests.unit.experts.backends.folders import (
    RTOL,
    content_of,
    lone_expert,
    predicted,
    save_mixture,
)

COUNTS = (1, 2, 3, 33, 1000)
DTYPES = ["float32", "float64"]
CELLS = {"plain": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


def mean(width: int) -> dict[str, Any]:
    return {"kind": "mean", "shape": [width]}


def rows_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def torch_expert(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    row_shape: list[int],
    combine: Mapping[str, Any],
    dtype: str = "float64",
    **part: Any,
) -> MixtureExpert:
    """Load an expert whose tensors are those of a torch module, in the mixture's dtype."""
    kept = {name: t.detach().to(getattr(torch, dtype)).contiguous() for name, t in tensors.items()}
    part = {"file": "e.safetensors", **part}
    return lone_expert(folder, part, {"e.safetensors": save(kept)}, row_shape, combine, dtype)


def check_bits(expert: MixtureExpert, rows: np.ndarray) -> None:
    """Check that rows have the same bits among 1, 2, 3, 33 and 1,000, wherever they are."""
    whole = predicted(expert, rows)
    for count in COUNTS:
        for begin in (0, 1, 5, len(rows) - count):
            part = predicted(expert, rows[begin : begin + count])
            np.testing.assert_array_equal(part, whole[begin : begin + count])


def check_close(expert: MixtureExpert, ours: np.ndarray, own: torch.Tensor, dtype: str) -> None:
    """Compare with torch, relative to the largest value: a sum near 0 has no relative error."""
    right = own.detach().numpy()
    assert ours.shape == right.shape
    np.testing.assert_allclose(ours, right, rtol=0, atol=RTOL[dtype] * np.abs(right).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(1, 1), (13, 7), (64, 10), (200, 1)])
def test_linear(tmp_path: Path, dtype: str, size: int, width: int) -> None:
    module = torch.nn.Linear(size, width, dtype=getattr(torch, dtype))
    expert = torch_expert(tmp_path, module.state_dict(), [size], mean(width), dtype, kind="linear")
    rows = rows_of(1010, size)
    own = module(torch.from_numpy(rows).to(module.weight.dtype))
    check_close(expert, predicted(expert, rows), own, dtype)
    check_bits(expert, rows)
    assert expert.num_bytes == (size + 1) * width * np.dtype(dtype).itemsize
    assert predicted(expert, rows[:0]).shape == (0, width)


def test_a_linear_expert_without_a_bias_takes_rows_of_several_axes(tmp_path: Path) -> None:
    module = torch.nn.Linear(12, 2, bias=False, dtype=torch.float64)
    expert = torch_expert(tmp_path, module.state_dict(), [3, 4], mean(2), kind="linear")
    rows = rows_of(5, 3, 4)
    own = module(torch.from_numpy(rows).flatten(1))
    check_close(expert, predicted(expert, rows), own, "float64")
    assert (expert.takes((3, 4)), expert.takes((12,)), expert.takes((4, 3))) == (True, False, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "link"),
    [*((name, "none") for name in ACTIVATIONS), ("relu", "softmax"), ("relu", "sigmoid")],
)
def test_mlp_with_each_activation_and_link(
    tmp_path: Path, dtype: str, activation: str, link: str
) -> None:
    sizes, kind = [20, 33, 17, 3], getattr(torch, dtype)
    layers = torch.nn.ModuleList(
        torch.nn.Linear(a, b, dtype=kind) for a, b in itertools.pairwise(sizes)
    )
    part = {"kind": "mlp", "activation": activation, "link": link}
    expert = torch_expert(tmp_path, layers.state_dict(), [20], mean(3), dtype, **part)
    rows = rows_of(1010, 20) * 3
    values = torch.from_numpy(rows).to(kind)
    for layer in layers[:-1]:
        values = ACTIVATIONS[activation](layer(values))
    own = layers[-1](values)
    if link != "none":
        own = own.softmax(-1) if link == "softmax" else own.sigmoid()
    check_close(expert, predicted(expert, rows), own, dtype)
    check_bits(expert, rows)


def test_values_beyond_the_range_of_exp_are_no_error(tmp_path: Path) -> None:
    tensors = {"weight": torch.eye(3)}
    rows = np.array([[-1e30, 0.0, 1e30]])
    for link, right in (("sigmoid", [[0, 0.5, 1]]), ("softmax", [[0, 0, 1]])):
        expert = torch_expert(
            tmp_path / link, tensors, [3], mean(3), "float32", kind="linear", link=link
        )
        assert predicted(expert, rows).tolist() == right


class Recurrent(torch.nn.Module):
    """The module that ``RnnExpert`` documents."""

    def __init__(self, rnn: torch.nn.RNNBase, head: torch.nn.Linear) -> None:
        super().__init__()
        self.rnn, self.head = rnn, head

    def forward(self, rows: torch.Tensor, returns: str) -> torch.Tensor:
        hidden, _ = self.rnn(rows)
        return self.head(hidden if returns == "sequence" else hidden[:, -1])


def recurrent(cell: str, sizes: tuple[int, int, int], dtype: str, **more: Any) -> Recurrent:
    torch.manual_seed(3)
    size, hidden, width = sizes
    rnn = CELLS[cell](size, hidden, batch_first=True, **more)
    return Recurrent(rnn, torch.nn.Linear(hidden, width)).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5, 33, 3), (1, 1, 1), (2, 3, 4)])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn(tmp_path: Path, cell: str, sizes: tuple[int, int, int], dtype: str) -> None:
    module = recurrent(cell, sizes, dtype)
    part = {"kind": "rnn", "cell": cell}
    expert = torch_expert(
        tmp_path, module.state_dict(), [-1, sizes[0]], mean(sizes[2]), dtype, **part
    )
    for steps in (1, 4):
        rows = rows_of(1010, steps, sizes[0])
        own = module(torch.from_numpy(rows).to(getattr(torch, expert.dtype)), "last")
        check_close(expert, predicted(expert, rows), own, dtype)
        check_bits(expert, rows)
    assert expert.num_bytes == sum(t.nbytes for t in module.state_dict().values())
    fits = [expert.takes(s) for s in ((1, sizes[0]), (9, sizes[0]), (0, sizes[0]), (sizes[0],))]
    assert fits == [True, True, False, False]


@pytest.mark.parametrize("cell", CELLS)
def test_rnn_that_returns_sequences_of_several_layers_without_biases(
    tmp_path: Path, cell: str
) -> None:
    module = recurrent(cell, (4, 6, 2), "float32", num_layers=3, bias=False)
    part = {"kind": "rnn", "cell": cell, "returns": "sequence", "link": "softmax"}
    combine = {"kind": "mean", "shape": [-1, 2]}
    expert = torch_expert(tmp_path, module.state_dict(), [-1, 4], combine, "float32", **part)
    for steps in (1, 7):
        rows = rows_of(1010, steps, 4)
        own = module(torch.from_numpy(rows).float(), "sequence").softmax(-1)
        check_close(expert, predicted(expert, rows), own, "float32")
        check_bits(expert, rows)
        assert predicted(expert, rows[:0]).shape == (0, steps, 2)


def test_a_plain_rnn_may_have_relu(tmp_path: Path) -> None:
    module = recurrent("plain", (4, 6, 2), "float64", nonlinearity="relu")
    part = {"kind": "rnn", "cell": "plain", "nonlinearity": "relu"}
    expert = torch_expert(tmp_path, module.state_dict(), [5, 4], mean(2), **part)
    rows = rows_of(3, 5, 4)
    own = module(torch.from_numpy(rows), "last")
    check_close(expert, predicted(expert, rows), own, "float64")
    assert not expert.takes((4, 4))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_narrower_weights_are_widened_and_wider_refused(
    tmp_path: Path, stored: torch.dtype
) -> None:
    weight = torch.randn(2, 3).to(stored)
    part = {"kind": "linear", "file": "e.safetensors", "prefix": "w."}
    files = {"e.safetensors": save({"w.weight": weight})}
    expert = lone_expert(tmp_path, part, files, [3], mean(2))
    rows = rows_of(4, 3)
    right = rows @ weight.double().numpy().T
    np.testing.assert_allclose(predicted(expert, rows), right, rtol=1e-12)
    files = {"e.safetensors": save({"w.weight": weight.double()})}
    with pytest.raises(CheckpointError, match="weight is float64, which float32 does not") as error:
        lone_expert(tmp_path, part, files, [3], mean(2), "float32")
    assert "allowed: float32, bfloat16, float16" in error.value.message


def test_experts_share_a_file_by_their_prefixes(tmp_path: Path) -> None:
    tensors = {f"{name}weight": torch.full((1, 2), value, dtype=torch.float64)
               for name, value in (("", 1.0), ("a.", 2.0), ("a.b.", 3.0))}  # fmt: skip
    part = {"kind": "linear", "file": "e.safetensors"}
    experts = {"x": part, "y": {**part, "prefix": "a."}, "z": {**part, "prefix": "a.b."}}
    mixture = save_mixture(
        tmp_path, content_of(experts, [2], mean(1)), {"e.safetensors": save(tensors)}
    )
    rows = np.ones((1, 2))
    values = [predicted(load_mixture_expert(mixture, i), rows)[0, 0] for i in range(3)]
    assert values == [2.0, 4.0, 6.0]


W, B = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
RNN = {
    "rnn.weight_ih_l0": torch.ones(8, 3, dtype=torch.float64),
    "rnn.weight_hh_l0": torch.ones(8, 2, dtype=torch.float64),
    "head.weight": torch.ones(2, 2, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("kind", "tensors", "words"),
    [
        ("linear", {"weigth": W}, "has no tensor weight; under this prefix are: weigth"),
        ("linear", {"weight": W, "biases": B}, "has tensors that are not used: biases"),
        ("linear", {"weight": W.T}, r"weight must have the shape \[2, 3\] \(given: \[3, 2\]\)"),
        ("linear", {"weight": W, "bias": W}, r"bias must have the shape \[2\]"),
        ("linear", {"weight": W.to(torch.int64)}, "weight is I64, which float64 does not"),
        ("linear", {"weight": W * float("nan")}, "weight has values that are not finite"),
        ("mlp", {"0.weight": W.T}, r"0.weight must have the shape \[2, 3\]"),
        ("mlp", {"0.weight": W, "2.weight": W}, "has no tensor 1.weight"),
        ("mlp", {"0.weight": W, "1.weight": W}, r"1.weight must have the shape \[2, 2\]"),
        ("mlp", {"0.weight": W, "head.weight": W}, "not used: head.weight"),
        ("rnn", {"head.weight": W}, "has no tensor rnn.weight_hh_l0"),
        ("rnn", RNN | {"rnn.weight_hh_l0": torch.ones(6, 2)}, "must have 4 times as many rows as"),
        ("rnn", RNN | {"rnn.weight_ih_l0": W}, r"rnn.weight_ih_l0 must have the shape \[8, 3\]"),
        (
            "rnn",
            RNN | {"rnn.bias_ih_l0": torch.ones(8)},
            "one of rnn.bias_ih_l0 and rnn.bias_hh_l0",
        ),
        ("rnn", RNN | {"rnn.weight_hr_l0": W}, "not used: rnn.weight_hr_l0"),
        ("rnn", RNN | {"rnn.weight_hh_l0_reverse": W}, "not used: rnn.weight_hh_l0_reverse"),
    ],
)
def test_wrong_tensors_are_named_with_file_and_key(
    tmp_path: Path, kind: str, tensors: dict[str, torch.Tensor], words: str
) -> None:
    part = {"kind": kind, "file": "e.safetensors"} | ({"cell": "lstm"} if kind == "rnn" else {})
    row_shape = [4, 3] if kind == "rnn" else [3]
    kept = {name: t.clone().contiguous() for name, t in tensors.items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        lone_expert(tmp_path, part, {"e.safetensors": save(kept)}, row_shape, mean(2))
    assert caught.value.field == f"{tmp_path / 'e.safetensors'}: experts.e"


@pytest.mark.parametrize("damage", ["cut", "other", "empty_header"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    whole = save({"weight": W})
    data = {"cut": whole[:-1], "other": b"PK\x03\x04" * 9, "empty_header": whole[:12]}[damage]
    part = {"kind": "linear", "file": "e.safetensors"}
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        lone_expert(tmp_path, part, {"e.safetensors": data}, [3], mean(2))
