"""Native norms against float64, and the modules that they replace.

Dimension letters: T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from cluster.native import native
from router.model.cpu.native_modules import NativeNorm, replace_modules
from router.model.grok import GrokNorm

assert native is not None
KINDS = {
    "rms": lambda size: MixtralRMSNorm(size, 1e-5),
    "gpt-oss": lambda size: GptOssRMSNorm(size, 1e-5),
    "grok": lambda size: GrokNorm(size, 1e-5),
    "layer": lambda size: nn.LayerNorm(size, bias=False),
}
SIZES = (1, 8, 31, 33, 64, 500, 2880, 16384)
ROUNDING = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def norm_of(kind: str, size: int, dtype: torch.dtype) -> Any:
    norm: Any = KINDS[kind](size)
    generator = torch.Generator().manual_seed(size)
    next(norm.parameters()).data = torch.randn(size, generator=generator)
    return norm.to(dtype).requires_grad_(False)


def replaced(norm: nn.Module) -> nn.Module:
    parent = nn.Sequential(norm)
    replace_modules(parent, "")
    return parent[0]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_transformers_and_independent_of_each_other(
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


@pytest.mark.parametrize("kind", KINDS)
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
