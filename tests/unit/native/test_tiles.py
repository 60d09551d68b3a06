"""Experts by AMX tiles, emulated: against float64, a row alone against the row in a crowd.

Where the processor has AMX, test_native_ffn.py asks the same of its own tiles.

Dimension letters: P rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import native as built
from experts.compute.ffn import ACTIVATIONS
from tests.native import emulated_amx
from tests.unit.experts.compute.test_native_ffn import CLAMPED, SIZES, Case, make

KERNELS = ["amx"] if emulated_amx.IS_POSSIBLE else []
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
BFLOAT16 = torch.bfloat16
CASES = st.builds(
    make,
    st.integers(0, 10_000),
    dtype=st.just(BFLOAT16),
    num_rows=st.integers(1, 70),
    hidden=SIZES,
    inner=SIZES,
    activation=st.sampled_from([*ACTIVATIONS, CLAMPED]),
)
# Hypothesis would have a fixture for each example; one for all is meant.
EXAMPLES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def built_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_amx.build(tmp_path_factory.mktemp("native"))


@pytest.fixture(autouse=True)
def emulated(built_at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(built, "native", emulated_amx.load(built_at))


def case_of(
    num_rows: int, hidden: int, inner: int, activation: str = "silu", dtype: torch.dtype = BFLOAT16
) -> Case:
    sizes = {"num_rows": num_rows, "hidden": hidden, "inner": inner}
    return make(hidden, dtype=dtype, activation=activation, **sizes)


@pytest.mark.parametrize("kernel", KERNELS)
@EXAMPLES
@given(case=CASES)
def test_results_are_off_by_roundings_alone(kernel: str, case: Case) -> None:
    exact, bound = case.exact()
    assert ((case.computed(kernel).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
@EXAMPLES
@given(case=CASES, data=st.data())
def test_a_row_alone_has_the_bits_of_the_row_in_any_crowd(
    kernel: str, case: Case, data: st.DataObject
) -> None:
    num_rows = len(case.rows)
    together = case.computed(kernel)
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    assert torch.equal(case.computed(kernel, 1, begin, end), together[begin:end])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (33, 45), (94, 30), (256, 288)])
def test_neither_the_number_of_rows_nor_threads_change_a_bit(
    kernel: str, hidden: int, inner: int
) -> None:
    case = case_of(130, hidden, inner)
    together = case.computed(kernel)
    for threads in (3, 64):
        assert torch.equal(case.computed(kernel, threads), together)
    for count in (1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 99, 130):  # a tile has 16 rows
        assert torch.equal(case.computed(kernel, 3, 0, count), together[:count])
        assert torch.equal(case.computed(kernel, 1, 130 - count, 130), together[130 - count :])
        assert torch.equal(case.computed(kernel, 1, count - 1, count)[0], together[count - 1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38, 1e-39])
def test_what_is_no_number_too_large_or_too_small_stays_in_its_row(
    kernel: str, activation: str, value: float
) -> None:
    case = case_of(20, 45, 35, activation)
    clean = case.computed(kernel)
    assert clean.isfinite().all()
    case.rows[7, 11] = value
    got = case.computed(kernel)
    others = torch.arange(20) != 7
    assert torch.equal(got[others], clean[others])
    if abs(value) == 1e-39:
        case.rows[7, 11] = 0  # tiles take it as zero
        assert torch.equal(got, case.computed(kernel))
    else:
        assert not torch.equal(got[7], clean[7])
    if value != value:
        assert got[7].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_the_next_best_kernels(kernel: str, dtype: torch.dtype) -> None:
    case = case_of(40, 45, 70, dtype=dtype)
    assert torch.equal(case.computed(kernel), case.computed("portable"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variable", [None, *VARIABLES])
def test_a_variable_that_limits_onednn_forbids_tiles(
    kernel: str, variable: str | None, built_at: Path
) -> None:
    environment = dict(os.environ)
    if variable is not None:
        environment[variable] = "AVX512_CORE_BF16"
    program = (
        "import sys; from pathlib import Path; from tests.native.emulated_amx import load; "
        "print(*load(Path(sys.argv[1])).ffn_kernels())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, built_at], env=environment, capture_output=True, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    kernels = done.stdout
    assert ("('amx', 'fused', 'tiled')" in kernels) == (variable is None)
    assert "portable" in kernels
