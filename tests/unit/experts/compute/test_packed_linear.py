"""Packed linear layers: the same bits as torch's, and only where that is so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from router.model.cpu.packed_linear import PackedLinear, pack_linears, product_with

# Where packing is sure to be possible; elsewhere a trial decides, and the bits are the same anyway.
AMX = torch.cpu._is_amx_tile_supported()


def model_of(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers).requires_grad_(False).eval()


@pytest.mark.parametrize("shape", [(512, 256), (48, 96), (33, 17)])
def test_a_packed_layer_has_the_bits_of_torchs_for_any_number_of_rows(
    shape: tuple[int, int],
) -> None:
    linear = nn.Linear(*shape, bias=False, dtype=torch.bfloat16)
    model = model_of(linear)
    pack_linears(model)
    packed = model[0]
    assert isinstance(packed, PackedLinear) or not AMX
    for rows in (1, 2, 7, 16, 33, 64, 200):
        inputs = torch.randn(1, rows, shape[0], dtype=torch.bfloat16)
        assert torch.equal(packed(inputs), linear(inputs))


def test_layers_are_replaced_at_any_depth() -> None:
    inner = nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    model = model_of(nn.Sequential(inner), nn.ReLU())
    inputs = torch.randn(5, 32, dtype=torch.bfloat16)
    expected = model(inputs)
    pack_linears(model)
    assert isinstance(model[0][0], PackedLinear) or not AMX
    assert torch.equal(model(inputs), expected)


def test_what_has_no_packed_twin_stays() -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    model = model_of(
        nn.Linear(8, 8, bias=False),
        nn.Linear(8, 8, bias=True, dtype=torch.bfloat16),
        Doubled(8, 8, bias=False, dtype=torch.bfloat16),
    )
    layers = list(model)
    pack_linears(model)
    assert list(model) == layers


def test_a_layer_whose_twin_gives_other_bits_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda self, rows: torch.zeros(1))
    model = model_of(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16))
    pack_linears(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_has_the_bits_of_torchs(dtype: torch.dtype, has_bias: bool) -> None:
    linear = nn.Linear(96, 8, bias=has_bias, dtype=dtype).requires_grad_(False)
    product = product_with(linear.weight, linear.bias)
    is_packed = isinstance(getattr(product, "__self__", None), PackedLinear)
    if dtype == torch.float32 or has_bias:
        assert not is_packed
    else:
        assert is_packed or not AMX
    for rows in (1, 2, 33):
        inputs = torch.randn(rows, 96, dtype=dtype)
        assert torch.equal(product(inputs), linear(inputs))


def test_a_product_whose_twin_gives_other_bits_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda self, rows: torch.zeros(1))
    weight, inputs = torch.randn(8, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    assert torch.equal(product_with(weight)(inputs), nn.functional.linear(inputs, weight))
