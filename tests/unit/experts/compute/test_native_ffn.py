"""Experts in native code: every kernel against float64, a row alone against the row in a crowd.

Dimension letters: P rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import native as built
from cluster.wire.tensors import to_array, to_bytes
from experts.bank import GatedFfnExpert
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.ffn import ACTIVATIONS, clamped_ffn, gated_ffn
from experts.compute.kernel_classes import log_torch
from experts.compute.native_ffn import KERNELS, NativeFfn, compute_native
from router.model.cpu.formats import FORMATS
from tests.arrays import on_host, results

BUILT = [] if built.native is None else [built.native]
DTYPES = tuple(FORMATS)
# What a value of each dtype is off by at most, relative to it, when it is rounded to the dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SINGLE = ROUNDING[torch.float32]
CLAMPED = "clamped"


@dataclass
class Case:
    rows: torch.Tensor  # [P, H]
    weights: GatedFfnWeights
    activation: str

    def computed(
        self, kernel: str | None, threads: int = 1, begin: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """Return rows [begin, end) by a kernel, from memory at odd addresses."""
        expert = NativeFfn(on_host(self.weights), self.activation, 1)
        rows = self.rows[begin:end].contiguous()
        given_, out = bytearray(1 + rows.nbytes), bytearray(1 + rows.nbytes)
        packed = bytearray(1 + expert.num_bytes)
        given_[1:], packed[1:] = to_bytes(rows), expert.packed
        assert built.native is not None
        built.native.ffn(
            memoryview(given_)[1:], (len(rows),), (memoryview(packed)[1:],), memoryview(out)[1:],
            expert.shape, threads, kernel,
        )  # fmt: skip
        return torch.frombuffer(out[1:] or bytearray(4), dtype=rows.dtype)[: rows.numel()].view(
            rows.shape
        )

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the result in float64, and how far float32's sums may be off it."""
        parts = self.weights.map(torch.Tensor.double)
        rows = self.rows.double()
        if parts.gate_up_bias is not None:
            result = clamped_ffn(rows, parts)
        else:
            result = gated_ffn(rows, parts, ACTIVATIONS[self.activation])
        bias = parts.gate_up_bias
        sizes = rows.abs() @ parts.gate_up.abs().t() + (0 if bias is None else bias.abs())
        gate, up = sizes.chunk(2, dim=-1)
        # A gate moves its activation by 1.2 times as much at most, and the clamp adds 1 to up.
        inner = 1.2 * gate * (up + 1)
        hidden_size, length = rows.shape[1], parts.down.shape[1]
        steps = 2 * hidden_size + length + 40
        error = steps * SINGLE
        if self.rows.dtype == torch.bfloat16:
            error += ROUNDING[torch.bfloat16]  # "paired" rounds what is between the products
        bound = error * (inner @ parts.down.abs().t() + 1e-30)
        if parts.down_bias is not None:
            bound += SINGLE * parts.down_bias.abs()
        return result, bound + ROUNDING[self.rows.dtype] * result.abs() + 1e-7


def make(
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    num_rows: int,
    hidden: int,
    inner: int,
    activation: str = "silu",
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    gate_up = randn(2 * inner, hidden, scale=2 * hidden**-0.5)
    down = randn(hidden, inner, scale=inner**-0.5)
    biases = (randn(2 * inner), randn(hidden)) if activation == CLAMPED else ()
    return Case(randn(num_rows, hidden), GatedFfnWeights(gate_up, down, *biases), activation)


SIZES = st.one_of(st.integers(1, 80), st.sampled_from([96, 127, 128, 129, 255, 300]))
CASES = st.builds(
    make,
    st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(1, 40),
    hidden=SIZES,
    inner=SIZES,
    activation=st.sampled_from([*ACTIVATIONS, CLAMPED]),
)
NAMES = [name for name, *_ in KERNELS]


@pytest.mark.parametrize("kernel", NAMES)
@settings(max_examples=60)
@given(case=CASES)
def test_results_are_off_by_roundings_of_float32_sums_alone(kernel: str, case: Case) -> None:
    exact, bound = case.exact()
    assert ((case.computed(kernel).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", NAMES)
@settings(max_examples=60)
@given(case=CASES, data=st.data())
def test_a_row_alone_has_the_bits_of_the_row_in_any_crowd(
    kernel: str, case: Case, data: st.DataObject
) -> None:
    num_rows = len(case.rows)
    together = case.computed(kernel)
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    assert torch.equal(case.computed(kernel, 1, begin, end), together[begin:end])
    alone = data.draw(st.integers(0, num_rows - 1))
    assert torch.equal(case.computed(kernel, 1, alone, alone + 1)[0], together[alone])


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "inner", "num_rows"), [(512, 640, 200), (33, 3000, 97)])
def test_neither_many_rows_nor_threads_change_a_bit(
    kernel: str, dtype: torch.dtype, hidden: int, inner: int, num_rows: int
) -> None:
    # More rows than are computed in one slice.
    case = make(1, dtype=dtype, num_rows=num_rows, hidden=hidden, inner=inner)
    together = case.computed(kernel)
    for threads in (2, 5, 7, 65, 10**9):
        assert torch.equal(case.computed(kernel, threads), together)
    for row in range(0, num_rows, 13):
        assert torch.equal(case.computed(kernel, 1, row, row + 1)[0], together[row])


@settings(max_examples=60)
@given(case=CASES)
def test_kernels_of_a_class_have_equal_bits(case: Case) -> None:
    column = 2 if case.rows.dtype == torch.bfloat16 else 1
    first: dict[str, torch.Tensor] = {}
    for kernel in KERNELS:
        got = case.computed(kernel[0])
        assert torch.equal(got, first.setdefault(kernel[column], got))


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row(
    kernel: str, dtype: torch.dtype, activation: str, value: float
) -> None:
    case = make(2, dtype=dtype, num_rows=15, hidden=45, inner=35, activation=activation)
    clean = case.computed(kernel)
    assert clean.isfinite().all()
    case.rows[7, 11] = value
    got = case.computed(kernel)
    others = torch.arange(15) != 7
    assert torch.equal(got[others], clean[others])
    exact, _ = case.exact()
    if value != value:
        assert got[7].isnan().all()
    # A clamp makes infinite sums finite; whatever else is not finite is so in float64 too.
    assert torch.equal(got[7].isfinite(), exact[7].isfinite())


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_right_over_their_whole_range(kernel: str, activation: str) -> None:
    gates = torch.cat((torch.linspace(-120, 120, 4001), torch.logspace(-40, 38, 200)))
    gates = torch.cat((gates, -gates[-200:], torch.tensor([0.0, -0.0]))).unsqueeze(1)
    one = torch.ones(1, 1)
    rows = torch.cat((gates, torch.ones_like(gates)), dim=1)  # gate x = x[0], up x = x[1]
    weights = GatedFfnWeights(torch.eye(2), torch.cat((one, one)))
    got = Case(rows, weights, activation).computed(kernel)[:, 0].double()
    exact = ACTIVATIONS[activation](gates[:, 0].double())
    # gelu is computed to 1e-7 of x, as the error function is.
    allowed = 1e-6 * exact.abs() + 1.5e-7 * gates[:, 0].double().abs().clamp(max=10) + 1e-37
    assert ((got - exact).abs() <= allowed).all()


@pytest.mark.parametrize("kernel", NAMES)
def test_subnormal_weights_and_rows_count(kernel: str) -> None:
    for dtype, tiny in ((torch.float32, 1e-41), (torch.float16, 2.0**-20)):
        case = make(3, dtype=dtype, num_rows=5, hidden=20, inner=20, activation="relu")
        case.rows.fill_(1)
        parts = GatedFfnWeights(torch.ones(40, 20, dtype=dtype), case.weights.down)
        parts.gate_up[:20] = tiny
        got = Case(case.rows, parts, "relu").computed(kernel)
        exact, _ = Case(case.rows, parts, "relu").exact()
        unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((got.double() - exact).abs() <= 25 * unit + 2 * ROUNDING[dtype] * exact.abs()).all()
        assert got.abs().max() > 0


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_nearest_even(kernel: str, dtype: torch.dtype) -> None:
    """An expert that returns its row: relu(1) * x."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite()]
    if dtype == torch.bfloat16:  # "paired" takes its subnormal products as zero
        values = values[values.abs() >= 2.0**12 * torch.finfo(dtype).smallest_normal]
    sums = torch.cat((values, values)).unsqueeze(1)
    halves = torch.cat((torch.zeros_like(values), values * 2.0**-9)).unsqueeze(1)
    rows = torch.cat((torch.ones_like(sums), sums, halves.to(dtype)), dim=1)  # [P, 3]
    gate_up = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=dtype)
    weights = GatedFfnWeights(gate_up, torch.ones(3, 1, dtype=dtype))
    got = Case(rows, weights, "relu").computed(kernel)
    exact = (rows[:, 1].float() + rows[:, 2].float()).to(dtype)
    assert torch.equal(got, exact.unsqueeze(1).expand(-1, 3))


@pytest.mark.parametrize("sizes", [(64, 96), (96, 64)])
def test_an_expert_of_a_size_beyond_the_kernels_is_torchs_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sizes: tuple[int, int]
) -> None:
    case = make(0, num_rows=3, hidden=sizes[0], inner=sizes[1])
    native = GatedFfnExpert(on_host(case.weights), "silu", 1)
    assert isinstance(native.ffn, NativeFfn) == bool(BUILT)
    expected = native(case.rows.numpy())
    monkeypatch.setattr("experts.compute.native_ffn.MAX_SIZE", 95)
    log_torch.cache_clear()
    made = [GatedFfnExpert(on_host(case.weights), "silu", 1) for _ in range(2)]
    log_torch.cache_clear()
    for expert in made:
        assert not isinstance(expert.ffn, NativeFfn)
        assert expert.kernel_class.startswith("torch-")
        got = expert(case.rows.numpy())
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
    assert caplog.text.count("are computed by torch") == 1


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_experts_give_what_each_gives_by_itself(
    native: ModuleType, dtype: torch.dtype
) -> None:
    counts = (1, 0, 33, 7)
    cases = [make(i, dtype=dtype, num_rows=n, hidden=40, inner=56) for i, n in enumerate(counts)]
    rows = to_bytes(torch.cat([case.rows for case in cases]))
    for threads in (1, 3):
        experts = [NativeFfn(on_host(case.weights), "silu", threads) for case in cases]
        alone = [results(e, case.rows) for e, case in zip(experts, cases, strict=True)]
        assert compute_native(experts, counts, rows) == bytes(to_bytes(torch.cat(alone)))
    other = NativeFfn(on_host(cases[0].weights), "relu", 1)
    assert compute_native([*experts[:3], other], counts, rows) is None


@pytest.mark.parametrize("native", BUILT)
def test_rows_lie_anywhere_and_those_of_another_kind_are_refused(native: ModuleType) -> None:
    case = make(5, num_rows=12, hidden=40, inner=56)
    expert = NativeFfn(on_host(case.weights), "silu", 1)
    rows = to_array(case.rows)
    assert np.array_equal(expert(rows[::2]), expert(rows)[::2])
    assert expert(rows[:0]).shape == (0, 40)
    for wrong in (rows.astype(np.float16), rows[:, :39]):
        with pytest.raises(ValueError, match="rows must be"):
            expert(wrong)


RIGHT = (16, 16, 0, 0, 0)


def computed(
    native: ModuleType,
    rows: int = 128,
    counts: object = (2,),
    experts: object = (bytes(16 * 32 * 4 * 2),),
    out: int = 128,
    shape: object = RIGHT,
    threads: object = 1,
    kernel: object = None,
) -> None:
    native.ffn(bytes(rows), counts, experts, bytearray(out), shape, threads, kernel)


WRONG: dict[str, dict[str, object]] = {
    "half a row": {"rows": 96, "out": 96, "counts": (1,)},
    "more rows than there are": {"counts": (3,)},
    "fewer rows than there are": {"counts": (1,)},
    "less than no rows": {"counts": (-1,)},
    "a count too many": {"counts": (1, 1)},
    "an expert too many": {"experts": (bytes(4096),) * 2},
    "too little room": {"out": 64},
    "too much room": {"out": 192},
    "too few weights": {"experts": (bytes(4095),)},
    "too many weights": {"experts": (bytes(4097),)},
    "no weights": {"experts": (b"",)},
    "no biases": {"shape": (16, 16, 0, 0, 4)},
    "weights of another format": {"shape": (16, 16, 1, 0, 0)},
    "an unknown format": {"shape": (16, 16, 3, 0, 0)},
    "an unknown format of rows": {"shape": (16, 16, 0, -1, 0)},
    "rows of another format": {"shape": (16, 16, 0, 1, 0)},
    "an unknown activation": {"shape": (16, 16, 0, 0, 5)},
    "no hidden size": {"shape": (0, 16, 0, 0, 0)},
    "less than no intermediate size": {"shape": (16, -16, 0, 0, 0)},
    "another intermediate size": {"shape": (16, 17, 0, 0, 0)},
    "a huge hidden size": {"shape": (2**62, 16, 0, 0, 0)},
    "a huge intermediate size": {"shape": (16, 2**62, 0, 0, 0)},
    "the largest sizes": {"shape": (2**24, 2**24, 0, 0, 0)},
    "no threads": {"threads": 0},
    "an unknown kernel": {"kernel": "avx3"},
}
WRONG_TYPES: list[dict[str, object]] = [
    *({"counts": wrong} for wrong in ([2], ("2",))),
    *({"experts": wrong} for wrong in ([bytes(4096)], (None,))),
    *({"shape": w} for w in ([16, 16, 0, 0, 0], (16, 16, 0, 0), (16, "16", 0, 0, 0))),
    *({"threads": "1"}, {"kernel": 1}),
]


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("native", BUILT)
def test_wrong_numbers_are_refused_and_nothing_beyond_is_touched(
    case: str, native: ModuleType
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        computed(native, **WRONG[case])


@pytest.mark.parametrize("native", BUILT)
def test_what_the_wrong_cases_start_from_is_right(native: ModuleType) -> None:
    for right in ({}, {"rows": 0, "out": 0, "counts": (0,)}, {"threads": 10**9}):
        computed(native, **right)
    computed(native, rows=0, out=0, counts=(), experts=())
    for wrong in WRONG_TYPES:
        with pytest.raises(TypeError):
            computed(native, **wrong)
    with pytest.raises(TypeError):
        native.ffn(b"")
    with pytest.raises(TypeError):
        native.ffn_kernels(1)
    with pytest.raises(OverflowError):
        computed(native, threads=2**70)


NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**24, 2**31 - 1, 2**62, -(2**62)]))
SMALL = st.integers(-2, 70)


@pytest.mark.parametrize("native", BUILT)
@settings(max_examples=300)
@given(
    rows=st.integers(0, 600),
    counts=st.lists(NUMBERS, max_size=3).map(tuple),
    experts=st.lists(st.integers(0, 40_000).map(bytes), max_size=3).map(tuple),
    out=st.integers(0, 600),
    shape=st.tuples(NUMBERS, NUMBERS, SMALL, SMALL, SMALL),
    threads=NUMBERS,
)
def test_any_lengths_are_computed_or_refused(native: ModuleType, **case: object) -> None:
    with suppress(ValueError):
        computed(native, **case)


@pytest.mark.parametrize("native", BUILT)
def test_buffers_are_let_go(native: ModuleType) -> None:
    rows, out, expert = bytearray(128), bytearray(128), bytearray(4096)
    for counts in ((2,), (3,)):
        with suppress(ValueError):
            native.ffn(rows, counts, (expert,), out, RIGHT, 1, None)
    for buffer in (rows, out, expert):
        buffer.append(1)  # no view of it is held any more
