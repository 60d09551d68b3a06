"""Native norms give transformers' bits, and take no other module's place."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from cluster.native import built
from router.model.cpu import rms_norm as norms
from router.model.cpu.rms_norm import NativeNorm, replace_norms

BUILT = [] if built.native is None else [built.native]
# Around the ends of torch's vectors, chains and levels, and what models have.
SIZES = (8, 15, 31, 33, 64, 500, 512, 1000, 1023, 2048, 2880, 4096, 7168, 16384, 65560)


def norm_of(size: int, epsilon: float = 1e-5) -> Any:
    norm = MixtralRMSNorm(size, epsilon).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(size)
    norm.weight.data = torch.randn(size, generator=generator).to(torch.bfloat16)
    return norm.requires_grad_(False)


def replaced(norm: nn.Module) -> nn.Module:
    parent = nn.Sequential(norm)
    replace_norms(parent)
    return parent[0]


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("size", SIZES)
def test_rows_have_transformers_bits(native: ModuleType, size: int) -> None:
    norm = norm_of(size)
    own = replaced(norm)
    assert isinstance(own, NativeNorm)
    generator = torch.Generator().manual_seed(1)
    num_rows = max(3, 1_000_000 // size)
    rows = torch.randn(num_rows, size, generator=generator)
    rows = (rows * 10 ** torch.empty(num_rows, 1).uniform_(-6, 6, generator=generator)).bfloat16()
    for some in (rows, rows[:1], rows[:3].unsqueeze(0), rows[:0], rows[:, None].transpose(0, 1)):
        assert torch.equal(own(some), norm(some))


@pytest.mark.parametrize("native", BUILT)
def test_zeros_and_what_is_no_number_come_out_as_transformers_have_them(native: ModuleType) -> None:
    norm = norm_of(64)
    own = replaced(norm)
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    rows[1, 3], rows[2, 5] = torch.nan, torch.inf
    rows[3] = torch.finfo(torch.bfloat16).max
    assert torch.equal(own(rows).isnan(), norm(rows).isnan())
    assert torch.equal(own(rows).nan_to_num(), norm(rows).nan_to_num())


@pytest.mark.parametrize("native", BUILT)
def test_rows_that_do_not_lie_together_and_other_dtypes_come_out_right(native: ModuleType) -> None:
    norm = norm_of(16)
    own = replaced(norm)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()[:, ::2]
    assert torch.equal(own(rows), norm(rows))
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(own(rows.to(dtype)), norm(rows.to(dtype)))
        assert own(rows.to(dtype)).dtype == norm(rows.to(dtype)).dtype


class OneMore(MixtralRMSNorm):
    """Multiplies by one more than its weight, as Gemma's does."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1 + self.weight.float())).type_as(hidden_states)


class RoundsOnce(MixtralRMSNorm):
    """Multiplies in float32, as gpt-oss does."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(hidden_states.dtype)


class SumsOtherwise(MixtralRMSNorm):
    """Sums from the first value to the last: the bits of one value in some 200,000 differ."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        squares = wide.square().cumsum(-1)[..., -1:] / wide.shape[-1]
        wide = wide * torch.rsqrt(squares + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(64).bfloat16(),
    "of one dtype more": lambda: MixtralRMSNorm(64),
    "one more": lambda: OneMore(64).bfloat16(),
    "one rounding": lambda: RoundsOnce(64).bfloat16(),
    "fewer values than lanes": lambda: MixtralRMSNorm(7).bfloat16(),
    "another order of the sum": lambda: SumsOtherwise(512).bfloat16(),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_norms_stay(kind: str) -> None:
    module = OTHERS[kind]()
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    assert replaced(module) is module


@pytest.mark.parametrize("native", BUILT)
def test_weights_that_hide_a_formula_open_no_door_to_its_class(
    native: ModuleType,
) -> None:
    plain, telling = RoundsOnce(2880).bfloat16(), RoundsOnce(2880).bfloat16()
    telling.weight.data = torch.randn(2880, generator=torch.Generator().manual_seed(4)).bfloat16()
    model = nn.Sequential(plain, telling)
    replace_norms(model)
    assert model[1] is telling


@pytest.mark.parametrize("native", BUILT)
def test_hooks_stay_and_a_second_time_changes_nothing(native: ModuleType) -> None:
    seen: list[int] = []
    model = nn.Sequential(norm_of(64), norm_of(64), norm_of(64))
    model[1].register_forward_hook(lambda *_: seen.append(1))
    model[2].register_forward_pre_hook(lambda *_: seen.append(2))
    expected = model(torch.ones(2, 64).bfloat16())
    replace_norms(model)
    replace_norms(model)
    assert [isinstance(module, NativeNorm) for module in model] == [True, False, False]
    seen.clear()
    assert torch.equal(model(torch.ones(2, 64).bfloat16()), expected)
    assert seen == [1, 2]


def test_without_native_code_all_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "native", None)
    norm = norm_of(64)
    assert replaced(norm) is norm


def normalised(
    native: ModuleType, rows: int = 8, weights: int = 4, room: int = 8, epsilon: object = 1e-5
) -> None:
    native.normalise(bytes(rows), bytes(weights), epsilon, bytearray(room))


def rotated(
    native: ModuleType,
    heads: int = 24,
    cosines: int = 8,
    sines: int = 8,
    tokens: int = 2,
    size: int = 2,
    count: int = 3,
) -> None:
    native.rotate(bytearray(heads), bytes(cosines), bytes(sines), tokens, size, count)


WRONG = {
    "no weights": lambda n: normalised(n, weights=0),
    "half a weight": lambda n: normalised(n, weights=3),
    "rows that are no whole ones": lambda n: normalised(n, rows=10, room=10),
    "too little room": lambda n: normalised(n, room=4),
    "epsilon of another type": lambda n: normalised(n, epsilon="1"),
    "no tokens": lambda n: rotated(n, tokens=0),
    "very many tokens": lambda n: rotated(n, tokens=2**62),
    "fewer heads than are turned": lambda n: rotated(n, count=4),
    "fewer than no heads": lambda n: rotated(n, count=-1),
    "heads without halves": lambda n: rotated(n, size=3),
    "heads of no size": lambda n: rotated(n, size=0),
    "very large heads": lambda n: rotated(n, size=2**62),
    "half a head": lambda n: rotated(n, heads=22),
    "too few cosines": lambda n: rotated(n, cosines=4),
    "too few sines": lambda n: rotated(n, sines=4),
}


@pytest.mark.parametrize("native", BUILT)
def test_what_the_wrong_cases_start_from_is_right(native: ModuleType) -> None:
    normalised(native)
    rotated(native)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("native", BUILT)
def test_wrong_numbers_are_refused_and_nothing_beyond_is_touched(
    case: str, native: ModuleType
) -> None:
    with pytest.raises(TypeError if "another type" in case else ValueError):
        WRONG[case](native)
