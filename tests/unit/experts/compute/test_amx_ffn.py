"""Experts by AMX tiles: where they are used, what they refuse; bits are test_ffn.py's matter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from cluster.native import built
from cluster.spec import ExpertKey
from cluster.wire.frames import DispatchFrame, RowsFrame, decode, encode
from cluster.wire.tensors import to_bytes
from experts.bank import ExpertBank, GatedFfnExpert
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute import amx_ffn as tiled
from experts.compute import ffn
from experts.compute.amx_ffn import MAX_ROWS, TiledFfn, can_tile
from experts.compute.ffn import ffn_of, gated_ffn
from experts.compute.ffn_trials import keeps_bits

HAS_TILES = ffn._HAS_AMX and built.native is not None and built.native.may_tile()
# Elsewhere torch computes the same experts, and the same is asked of it.
BUILT = [] if built.native is None else [built.native]


@pytest.fixture(autouse=True)
def no_other_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "can_compute", lambda weights: False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expert_of(hidden: int = 64, inner: int = 96, scale: float = 1.0) -> GatedFfnWeights:
    generator = torch.Generator().manual_seed(hidden)
    parts = [
        (scale * torch.randn(shape, generator=generator)).bfloat16()
        for shape in ((2 * inner, hidden), (hidden, inner))
    ]
    return GatedFfnWeights(*parts)


def rows_of(count: int, hidden: int = 64) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_experts_are_tiled_where_the_processor_can_and_bits_stay() -> None:
    weights = expert_of()
    expert = ffn_of(weights, functional.silu)
    assert isinstance(expert, TiledFfn) == HAS_TILES
    for count in range(1, 40):
        rows = rows_of(count)
        assert torch.equal(expert(rows), gated_ffn(rows, weights, functional.silu)), count


@pytest.mark.parametrize(
    "rows", [torch.ones(3, 64), torch.ones(3, 64).half(), torch.ones(3, 32).bfloat16()]
)
def test_rows_of_another_kind_are_refused_as_torch_does(rows: torch.Tensor) -> None:
    with pytest.raises(RuntimeError):
        ffn_of(expert_of(), functional.silu)(rows)


@pytest.mark.parametrize(
    ("weights", "act"),
    [
        (expert_of(72, 96), functional.silu),
        (expert_of(64, 72), functional.silu),
        (expert_of(64, 32), functional.silu),
        (expert_of(), functional.gelu),
        (
            GatedFfnWeights(*(p.float() for p in (expert_of().gate_up, expert_of().down))),
            torch.relu,
        ),
    ],
    ids=["odd hidden size", "odd intermediate size", "tiny", "not placeless", "float32"],
)
def test_others_are_not(weights: GatedFfnWeights, act: object) -> None:
    assert not isinstance(ffn_of(weights, act), TiledFfn)


def test_without_native_code_or_permission_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "_may_tile", lambda: False)
    assert not can_tile(expert_of())
    monkeypatch.undo()
    monkeypatch.setattr(tiled, "native", None)
    assert not can_tile(expert_of())


def test_where_the_trial_finds_another_bit_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = TiledFfn.compute

    def a_bit_off(self: TiledFfn, rows: torch.Tensor) -> torch.Tensor:
        output = compute(self, rows)
        output.view(torch.int16)[-1, -1] ^= 1
        return output

    keeps_bits.cache_clear()
    monkeypatch.setattr(TiledFfn, "compute", a_bit_off)
    try:
        assert not isinstance(ffn_of(expert_of(), functional.silu), TiledFfn)
    finally:
        keeps_bits.cache_clear()


def test_more_rows_and_more_threads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = expert_of(64, 128)
    expert = ffn_of(weights, functional.silu)
    long = ffn_of(expert_of(4096, 32), functional.silu)
    counts: list[int] = []
    compute = TiledFfn.compute

    def counted(self: TiledFfn, rows: torch.Tensor) -> torch.Tensor:
        counts.append(len(rows))
        return compute(self, rows)

    monkeypatch.setattr(TiledFfn, "compute", counted)
    for count in (1, MAX_ROWS, MAX_ROWS + 1, 100):
        assert torch.equal(
            expert(rows_of(count)), gated_ffn(rows_of(count), weights, functional.silu)
        )
    by_tiles = [1, MAX_ROWS] if HAS_TILES else []
    assert counts == by_tiles
    # One row of a long sum is another product to oneDNN.
    assert long(rows_of(1, 4096)).shape == (1, 4096)
    torch.set_num_threads(2)
    expert(rows_of(3))
    assert counts == by_tiles


@pytest.mark.parametrize("act", [functional.silu, functional.relu])
def test_what_is_no_number_or_too_large_comes_out_as_torchs(act: object) -> None:
    weights = expert_of(scale=30.0)
    rows = rows_of(5)
    rows[1, 3], rows[2, 5], rows[3] = torch.nan, torch.inf, 1e38
    rows[4] = 1e-38
    expected = gated_ffn(rows, weights, act)
    got = ffn_of(weights, act)(rows)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_rows_that_do_not_lie_together_are_computed_too() -> None:
    weights = expert_of()
    expert = ffn_of(weights, functional.silu)
    for rows in (rows_of(6, 128)[:, ::2], rows_of(12)[::2], rows_of(64, 6).t()):
        rows = rows[:6]
        assert torch.equal(expert(rows), gated_ffn(rows.contiguous(), weights, functional.silu))


def test_threads_compute_side_by_side_without_a_trace_of_each_other() -> None:
    weights = expert_of(512, 1024)
    expert = ffn_of(weights, functional.silu)
    samples = [rows_of(count, 512) for count in (1, 3, 16, 17, 31, 32)]
    expected = [gated_ffn(rows, weights, functional.silu) for rows in samples]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            for got, wanted in zip(threads.map(expert, samples), expected, strict=True):
                assert torch.equal(got, wanted)


def computed(
    native: ModuleType,
    rows: int = 128,
    counts: object = (2,),
    gate_up: int = 2 * 2 * 32 * 32,
    down: int = 2 * 32 * 32,
    activation: int = 1 << 17,
    room: int = 128,
    hidden: object = 32,
    inner: object = 32,
    weights: object = None,
) -> None:
    weights = ((bytes(gate_up), bytes(down)),) if weights is None else weights
    activation_, out = bytes(activation), bytearray(room)
    native.tiled_ffns(bytes(rows), counts, weights, activation_, out, hidden, inner)


WRONG = {
    "no rows": {"rows": 0, "room": 0, "counts": (0,)},
    "half a row": {"rows": 96, "room": 96, "counts": (1,)},
    "too many rows": {"rows": 33 * 64, "room": 33 * 64, "counts": (33,)},
    "more rows than there are": {"counts": (3,)},
    "fewer rows than there are": {"counts": (1,)},
    "less than no rows": {"counts": (-1,)},
    "a count too many": {"counts": (1, 1)},
    "weights too many": {"weights": ((bytes(4096), bytes(2048)),) * 2},
    "too little room": {"room": 64},
    "too few weights first": {"gate_up": 4094},
    "too few weights last": {"down": 2046},
    "no activation": {"activation": 0},
    "odd hidden size": {"hidden": 16},
    "odd intermediate size": {"inner": 48},
    "no hidden size": {"hidden": 0},
    "less than no intermediate size": {"inner": -32},
    "a huge hidden size": {"hidden": 2**62},
    "a huge intermediate size": {"inner": 2**62},
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("native", BUILT)  # where there are no tiles, everything is refused
def test_wrong_numbers_are_refused_and_nothing_beyond_is_touched(
    case: str, native: ModuleType
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        computed(native, **WRONG[case])


@pytest.mark.parametrize("native", BUILT)
def test_what_the_wrong_cases_start_from_is_right(native: ModuleType) -> None:
    right = [{}, {"rows": 0, "room": 0, "counts": (), "weights": ()}]
    for case in right:
        with nullcontext() if HAS_TILES else pytest.raises(ValueError, match="may_tile"):
            computed(native, **case)
    for wrong in (
        {"hidden": "32"},
        {"counts": [2]},
        {"counts": ("2",)},
        {"weights": [(b"", b"")]},
        {"weights": (b"",)},
        {"weights": ((b"",),)},
        {"weights": ((None, b""),)},
    ):
        with pytest.raises(TypeError if HAS_TILES else (TypeError, ValueError)):
            computed(native, **wrong)
    with pytest.raises(TypeError):
        native.tiled_ffns(b"")
    with pytest.raises(TypeError):
        native.may_tile(1)


@pytest.mark.parametrize("native", BUILT)
def test_buffers_are_let_go(native: ModuleType) -> None:
    rows, out, first, last = bytearray(128), bytearray(128), bytearray(4096), bytearray(2048)
    for counts in ((2,), (3,)):
        with suppress(ValueError):
            native.tiled_ffns(rows, counts, ((first, last),), bytes(1 << 17), out, 32, 32)
    for buffer in (rows, out, first, last):
        buffer.append(1)  # no view of it is held any more


def bank_of(*experts: GatedFfnWeights, act: object = functional.silu) -> ExpertBank:
    bank = ExpertBank()
    for expert_id, weights in enumerate(experts):
        bank.hold(ExpertKey("m", 0, expert_id), GatedFfnExpert(weights, act))
    return bank


def frame_of(counts: dict[int, int], rows: torch.Tensor, request_id: int = 1) -> DispatchFrame:
    frame = DispatchFrame(
        request_id=request_id,
        num_rows=len(rows),
        model="m",
        layer_id=0,
        row_shape=(rows.shape[1],),
        expert_ids=tuple(counts),
        num_tokens_per_expert=tuple(counts.values()),
        dtype="bfloat16",
        time_left_s=1e12,
        rows=bytes(to_bytes(rows)),
    )
    decoded = decode(b"".join(encode(frame)))
    assert isinstance(decoded, DispatchFrame)
    return decoded


@pytest.mark.parametrize(
    "counts", [{0: 1}, {2: 5}, {0: 1, 1: 32, 2: 7}, {0: 3, 2: 33}, {1: 100, 2: 1}]
)
@pytest.mark.parametrize("kind", ["alike", "one of another size", "one that is not tiled"])
@pytest.mark.parametrize("num_frames", [1, 2])
def test_a_frames_experts_give_what_each_gives_by_itself(
    counts: dict[int, int], kind: str, num_frames: int
) -> None:
    inner = {"alike": 96, "one of another size": 160, "one that is not tiled": 72}[kind]
    experts = [expert_of(), expert_of(64, inner), expert_of(64, 96, 2.0)]
    rows = rows_of(sum(counts.values()))
    frames = [frame_of(counts, rows, request_id) for request_id in range(num_frames)]
    expected = []
    for expert_id, some in zip(counts, rows.split(list(counts.values())), strict=True):
        of_all_frames = torch.cat([some] * num_frames)
        expected.append(gated_ffn(of_all_frames, experts[expert_id], functional.silu)[: len(some)])
    for answer in bank_of(*experts).compute(frames):
        assert isinstance(answer, RowsFrame)
        got = b"".join(bytes(part) for part in answer.rows)
        assert got == bytes(to_bytes(torch.cat(expected)))
