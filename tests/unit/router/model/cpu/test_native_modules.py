"""Linear layers and norms in native code, against float64, and a row alone against a crowd.

Dimension letters: P rows, K input size, O output size.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from cluster.native import native
from cluster.wire.tensors import to_array, to_bytes
from experts.compute.native_ffn import KERNELS
from experts.compute.panels import pack_matrix
from router.model.cpu import native_modules
from router.model.cpu.formats import FORMATS
from router.model.cpu.native_modules import NativeLinear, NativeMlp, NativeNorm, replace_modules
from router.model.grok import GrokNorm

assert native is not None
NAMES = [name for name, *_ in KERNELS]
DTYPES = tuple(FORMATS)


def product(
    kernel: str | None,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> torch.Tensor:
    """Return rows times a weight by a kernel, from memory at odd addresses."""
    out = torch.empty(len(rows), len(weight), dtype=dtype)
    packed = pack_matrix(to_array(weight), None if bias is None else to_array(bias)).data
    given_ = to_bytes(rows.contiguous())
    odd_packed, odd_rows = bytearray(1 + packed.nbytes), bytearray(1 + given_.nbytes)
    odd_packed[1:], odd_rows[1:] = packed, given_
    formats = FORMATS[weight.dtype], FORMATS[rows.dtype], FORMATS[dtype], int(bias is not None)
    sizes = (1, weight.shape[1], weight.shape[0], *formats)
    native.linear(
        memoryview(odd_rows)[1:], memoryview(odd_packed)[1:], to_bytes(out), sizes, threads, kernel
    )
    return out


SIZES = st.one_of(st.integers(1, 80), st.sampled_from([96, 127, 129, 512, 1025]))


@pytest.mark.parametrize("kernel", NAMES)
@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 230),
    size=SIZES,
    outputs=SIZES,
    dtype=st.sampled_from(DTYPES),
    row_dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    data=st.data(),
)
def test_sums_are_float32s_and_a_row_has_its_bits_in_any_crowd(
    kernel: str,
    seed: int,
    num_rows: int,
    size: int,
    outputs: int,
    dtype: torch.dtype,
    row_dtype: torch.dtype,
    has_bias: bool,
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, size, generator=generator).to(row_dtype)
    weight = torch.randn(outputs, size, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    together = product(kernel, rows, weight, bias)
    exact = functional.linear(
        rows.double(), weight.double(), None if bias is None else bias.double()
    )
    bound = (size + 2) * 2.0**-24 * (rows.double().abs() @ weight.double().abs().t() + 4)
    assert ((together.double() - exact).abs() <= bound).all()
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    assert torch.equal(product(kernel, rows[begin:end], weight, bias), together[begin:end])
    threads = data.draw(st.sampled_from([2, 5, 1000]))
    assert torch.equal(product(kernel, rows, weight, bias, threads=threads), together)
    for narrow in (torch.bfloat16, torch.float16):
        assert torch.equal(product(kernel, rows, weight, bias, narrow), together.to(narrow))


@pytest.mark.parametrize("threads", [2, 3, 1000])
@pytest.mark.parametrize("num_rows", [32, 200])
@pytest.mark.parametrize("kernel", NAMES)
def test_shares_that_are_worth_a_thread_have_the_bits_of_one_thread(
    kernel: str, num_rows: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 512, generator=generator)
    weight = torch.randn(1000, 512, generator=generator)
    alone = product(kernel, rows, weight)
    assert torch.equal(product(kernel, rows, weight, threads=threads), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_of_a_class_have_equal_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(37, 301, generator=generator).to(dtype)
    weight = torch.randn(101, 301, generator=generator).to(dtype)
    first: dict[str, torch.Tensor] = {}
    for name, wide, narrow in KERNELS:
        got = product(name, rows, weight)
        kernel_class = narrow if dtype == torch.bfloat16 else wide
        assert torch.equal(got, first.setdefault(kernel_class, got))


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(kernel: str, value: float) -> None:
    rows, weight = torch.ones(20, 33), torch.ones(40, 33)
    rows[7, 5] = value
    got = product(kernel, rows, weight)
    others = torch.arange(20) != 7
    assert (got[others] == 33).all()
    assert not got[7].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_heads_have_rows_of_their_own(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 20, 33, generator=generator).to(dtype)
    rows = torch.randn(1, 3, 7, 33, generator=generator).to(dtype)
    together = NativeLinear(weight)
    expected = [NativeLinear(matrix)(rows[0, i]) for i, matrix in enumerate(weight)]
    assert torch.equal(together(rows), torch.stack(expected)[None])
    assert together(rows[:, :, :0]).shape == (1, 3, 0, 20)


def mlp_of(size: int, inner: int, bias: bool = False) -> Any:
    mlp: Any = nn.Module()
    mlp.gate_proj, mlp.up_proj = (nn.Linear(size, inner, bias=bias) for _ in range(2))
    mlp.down_proj, mlp.act_fn = nn.Linear(inner, size, bias=bias), nn.SiLU()
    return mlp


def test_a_models_linear_layers_are_replaced() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.plain, model.biased = nn.Linear(48, 20, bias=False), nn.Linear(48, 20)
    mlp = model.mlp = mlp_of(48, 64)
    model.requires_grad_(False)
    rows = torch.randn(1, 5, 48)
    expected = [model.plain(rows), model.biased(rows)]
    inner = functional.silu(mlp.gate_proj(rows)) * mlp.up_proj(rows)
    expected.append(mlp.down_proj(inner))
    replace_modules(model, "silu")
    kinds = [type(layer) for layer in (model.plain, model.biased, model.mlp)]
    assert kinds == [NativeLinear, NativeLinear, NativeMlp]
    got = [layer(rows) for layer in (model.plain, model.biased, model.mlp)]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert model.plain(rows[:, :0]).shape == (1, 0, 20)
    assert torch.equal(model.plain(rows[:, ::2]), model.plain(rows)[:, ::2])


def test_each_weight_is_packed_once_and_freed_before_the_next_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), mlp_of(8, 8)) for _ in range(3)))
    weights = [weakref.ref(layer.get_parameter("1.up_proj.weight")) for layer in model]
    alive = []

    def packed(weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        alive.append(sum(ref() is not None for ref in weights))
        return pack_matrix(weight, bias)

    monkeypatch.setattr(native_modules, "pack_matrix", packed)
    replace_modules(model, "silu")
    assert alive == [3, 2, 1]  # each layer's only linear layer outside the MLP


def test_an_mlp_with_biases_or_an_unknown_activation_stays_linear_layers() -> None:
    for bias, activation in ((True, "silu"), (False, "tanh")):
        model = nn.Sequential(mlp_of(8, 8, bias))
        replace_modules(model, activation)
        assert {type(part) for part in model[0].children()} == {NativeLinear, nn.SiLU}


NORMS = {
    "rms": lambda size: MixtralRMSNorm(size, 1e-5),
    "gpt-oss": lambda size: GptOssRMSNorm(size, 1e-5),
    "grok": lambda size: GrokNorm(size, 1e-5),
    "layer": lambda size: nn.LayerNorm(size, bias=False),
}
NORM_SIZES = (1, 8, 31, 33, 64, 500, 2880, 16384)
ROUNDING = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def norm_of(kind: str, size: int, dtype: torch.dtype) -> Any:
    norm: Any = NORMS[kind](size)
    generator = torch.Generator().manual_seed(size)
    next(norm.parameters()).data = torch.randn(size, generator=generator)
    return norm.to(dtype).requires_grad_(False)


def replaced(norm: nn.Module) -> nn.Module:
    parent = nn.Sequential(norm)
    replace_modules(parent, "")
    return parent[0]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("size", NORM_SIZES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_transformers_and_independent_of_other_rows(
    kind: str, size: int, dtype: torch.dtype
) -> None:
    norm = norm_of(kind, size, dtype)
    own = replaced(norm)
    assert isinstance(own, NativeNorm)
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-3, 3, 9).unsqueeze(1)
    rows = (torch.randn(9, size, generator=generator) * scales).to(dtype)
    exact = norm_of(kind, size, torch.float64)
    next(exact.parameters()).data = next(norm.parameters()).double()
    if kind != "layer":
        wide = rows.double()
        expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        expected *= next(norm.parameters()).double()
    else:
        expected = exact(rows.double())
    got = own(rows)
    assert got.dtype == dtype
    # A layer norm subtracts the mean, so the error of a value near it is that of the row's largest.
    scale = expected.abs().amax(1, keepdim=True) if kind == "layer" else expected.abs()
    assert ((got.double() - expected).abs() <= ROUNDING[dtype] * (scale + 1e-3)).all()
    assert torch.equal(torch.cat([own(row.unsqueeze(0)) for row in rows]), got)
    assert torch.equal(own(rows[:, None].transpose(0, 1))[0], got)
    assert own(rows[:0]).shape == (0, size)


@pytest.mark.parametrize("kind", NORMS)
def test_zeros_stay_and_what_is_no_number_stays_in_its_row(kind: str) -> None:
    own = replaced(norm_of(kind, 64, torch.float32))
    rows = torch.zeros(4, 64)
    rows[1, 3], rows[2, 5] = torch.nan, torch.inf
    got = own(rows)
    assert (got[[0, 3]] == 0).all()
    assert got[1].isnan().all()
    assert not got[2].isfinite().all()


def test_norms_with_a_bias_and_unknown_ones_stay() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

    for norm in (nn.LayerNorm(8), Centred(), nn.BatchNorm1d(8)):
        assert replaced(norm) is norm
