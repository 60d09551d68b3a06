"""The expert's product by torch and by AMX: the bits of functional.linear, whichever way.

Dimension letters: P rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional

from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute import ffn
from experts.compute.ffn import ACTIVATIONS, Activation, ffn_of, gated_ffn

Make = Callable[[int, int, int, torch.dtype], tuple[torch.Tensor, GatedFfnWeights]]

# Around every number at which a kernel, a tile or a padded size begins.
NUM_ROWS = (*range(1, 10), 15, 16, 17, 24, 31, 32, 33, 36, 37, 40)


@pytest.fixture(autouse=True, scope="module", params=(1, 2), ids=("1 thread", "2 threads"))
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_other_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "can_compute", lambda weights: False)


def plain_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """transformers' eager expert."""
    gate, up = functional.linear(rows, weights.gate_up).chunk(2, dim=-1)
    return functional.linear(act(gate) * up, weights.down)


def cancelling_first(
    num_rows: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[torch.Tensor, GatedFfnWeights]:
    """Rows and weights whose first sums cancel: what is left is their rounding, by any order."""
    rows = torch.randn(num_rows, hidden)
    gate_up = torch.randn(2 * inner, hidden)
    rows[:, hidden // 2 :] = -rows[:, : hidden // 2]
    gate_up[:, hidden // 2 :] = gate_up[:, : hidden // 2]
    # What is left is small: scaled up, it reaches where the activation is no straight line.
    weights = GatedFfnWeights(gate_up.mul(1e3).to(dtype), torch.randn(hidden, inner).to(dtype))
    return rows.mul(1e3).to(dtype), weights


def cancelling_second(
    num_rows: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[torch.Tensor, GatedFfnWeights]:
    """Rows and weights whose last sums cancel."""
    gate, up = torch.randn(2, inner, hidden)
    down = torch.randn(hidden, inner)
    gate[inner // 2 :] = gate[: inner // 2]
    up[inner // 2 :] = -up[: inner // 2]
    down[:, inner // 2 :] = down[:, : inner // 2]
    weights = GatedFfnWeights(torch.cat((gate, up)).to(dtype), down.to(dtype))
    return torch.randn(num_rows, hidden).to(dtype), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "inner"), [(16, 24), (40, 56), (64, 96), (512, 1024)])
@pytest.mark.parametrize("make", [cancelling_first, cancelling_second])
@torch.inference_mode()
def test_any_number_of_rows_has_the_bits_of_linear(
    make: Make, hidden: int, inner: int, name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(hidden)
    rows, weights = make(max(NUM_ROWS), hidden, inner, dtype)
    act = ACTIVATIONS[name]
    for num_rows in NUM_ROWS:
        expected = plain_ffn(rows[:num_rows], weights, act)
        assert torch.equal(gated_ffn(rows[:num_rows], weights, act), expected), num_rows
        assert torch.equal(ffn_of(weights, act)(rows[:num_rows]), expected), num_rows


@pytest.mark.parametrize(
    ("hidden", "inner"), [(64, 64), (72, 128), (128, 72), (1024, 2048), (512, 5120), (3072, 1024)]
)
@pytest.mark.parametrize("make", [cancelling_first, cancelling_second])
@torch.inference_mode()
def test_one_row_has_the_bits_of_linear(make: Make, hidden: int, inner: int) -> None:
    torch.manual_seed(hidden)
    rows, weights = make(1, hidden, inner, torch.bfloat16)
    expected = plain_ffn(rows, weights, functional.silu)
    assert torch.equal(gated_ffn(rows, weights, functional.silu), expected)
    assert torch.equal(ffn_of(weights, functional.silu)(rows), expected)


@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (512, 1024)])
@pytest.mark.parametrize("make", [cancelling_first, cancelling_second])
@torch.inference_mode()
def test_many_rows_have_the_bits_of_linear(make: Make, hidden: int, inner: int) -> None:
    torch.manual_seed(hidden)
    rows, weights = make(420, hidden, inner, torch.bfloat16)
    expert = ffn_of(weights, functional.silu)
    for num_rows in (
        41,
        63,
        64,
        65,
        95,
        100,
        127,
        128,
        200,
        321,
        344,
        351,
        352,
        353,
        354,
        384,
        420,
    ):
        expected = plain_ffn(rows[:num_rows], weights, functional.silu)
        got = gated_ffn(rows[:num_rows], weights, functional.silu)
        assert torch.equal(got, expected), num_rows
        assert torch.equal(expert(rows[:num_rows]), expected), num_rows


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_a_placeless_activation_has_one_result_for_a_value(name: str) -> None:
    act = ACTIVATIONS[name]
    assert act in ffn._POSITION_FREE
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    single = torch.cat([act(value) for value in values.split(1)])
    assert torch.equal(act(values), single)
