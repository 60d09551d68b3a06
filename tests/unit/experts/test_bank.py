"""Experts loaded by slices and computed in banks: bit for bit what transformers computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from cluster.errors import ExpertFailedError, FrameError, WrongPlacementError
from cluster.native import native
from cluster.spec import ExpertKey, ModelExperts
from cluster.wire.frames import Buffer, DispatchFrame, ErrorFrame, RowsFrame, decode, encode, joined
from cluster.wire.tensors import TORCH_DTYPES, from_bytes, to_bytes
from experts.bank import MAX_PIECES, ExpertBank, GatedFfnExpert
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.ffn import ACTIVATIONS
from experts.families.base import ACTIVATION_NAMES
from tests.arrays import loaded, on_host, results
from tests.checkpoints import save_mixtral
from tests.local_cluster import MODEL, load_banks
from tests.unit.experts.frames import dispatch_frame

HIDDEN = 64
DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products on many threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for dtype in DTYPES:
        folders[dtype] = tmp_path_factory.mktemp(dtype)
        save_mixtral(folders[dtype], TORCH_DTYPES[dtype])
    return folders


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> dict[str, list[MixtralExperts]]:
    """transformers' eager experts of every layer, by dtype."""
    return {
        dtype: [
            layer.mlp.experts
            for layer in MixtralForCausalLM.from_pretrained(
                folder, dtype=TORCH_DTYPES[dtype], experts_implementation="eager"
            ).model.layers
        ]
        for dtype, folder in folders.items()
    }


@pytest.fixture
def bank(folders: dict[str, Path]) -> ExpertBank:
    """A bank with all fp32 experts of the small checkpoint."""
    checkpoint = open_checkpoint(folders["float32"])
    keys = ModelExperts(MODEL, checkpoint.shape.layers, 8, 1).expert_keys()
    return load_banks(checkpoint, {"all": keys}, "float32")["all"]


def rows_of(num_rows: int, seed: int = 0, dtype: str = "float32") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, HIDDEN, generator=generator).to(TORCH_DTYPES[dtype])


def frame_of(
    rows: torch.Tensor, pairs: Mapping[int, Sequence[int]], layer_id: int = 0, request_id: int = 1
) -> DispatchFrame:
    """A frame that sends ``rows[i]`` for every i in ``pairs[expert]`` to that expert."""
    index = [i for rows_ in pairs.values() for i in rows_]
    counts = {expert_id: len(rows_) for expert_id, rows_ in pairs.items()}
    return dispatch_frame(rows[index], counts, request_id=request_id, layer_id=layer_id)


def answer_rows(answer: RowsFrame | ErrorFrame) -> torch.Tensor:
    assert isinstance(answer, RowsFrame)
    return from_bytes(joined(answer.rows), answer.dtype, answer.num_rows, answer.row_shape)


# Weights.


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_loaded_by_slices_is_transformers_expert_bit_for_bit(
    folders: dict[str, Path], oracles: dict[str, list[MixtralExperts]], dtype: str
) -> None:
    checkpoint = open_checkpoint(folders[dtype])
    for layer_id, experts in enumerate(oracles[dtype]):
        for expert_id in range(8):
            right = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
            for asked in (dtype, "bfloat16"):
                weights = loaded(checkpoint, layer_id, expert_id, asked)
                assert torch.equal(weights.gate_up, right[0].to(TORCH_DTYPES[asked]))
                assert torch.equal(weights.down, right[1].to(TORCH_DTYPES[asked]))
                assert weights.gate_up.is_contiguous()
                assert weights.num_bytes == 3 * 64 * 96 * TORCH_DTYPES[asked].itemsize


@pytest.mark.parametrize("name", sorted({*ACTIVATION_NAMES, *ACTIVATIONS}))
def test_each_activation_that_a_checkpoint_may_name_is_transformers_own(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    assert name in ACTIVATION_NAMES
    assert torch.equal(ACTIVATIONS[name](x), ACT2FN[name](x))


# Banks.


def test_a_bank_computes_what_a_plain_loop_computes(
    bank: ExpertBank, oracles: dict[str, list[MixtralExperts]]
) -> None:
    rows, pairs = rows_of(5), {2: [4, 0, 3], 0: [1], 7: [2, 2]}
    [answer] = bank.compute([frame_of(rows, pairs, layer_id=1, request_id=9)])
    expected = []
    for expert_id, indices in pairs.items():
        experts = oracles["float32"][1]
        gate, up = functional.linear(rows[indices], experts.gate_up_proj[expert_id]).chunk(2, -1)
        expected.append(functional.linear(functional.silu(gate) * up, experts.down_proj[expert_id]))
    assert answer.request_id == 9
    assert_near(answer_rows(answer), torch.cat(expected))


def test_merged_frames_get_what_each_gets_alone(bank: ExpertBank) -> None:
    frames = [
        frame_of(rows_of(4, 1), {1: [0, 1], 2: [2, 3]}, request_id=1),
        frame_of(rows_of(6, 2), {2: [5, 0], 1: [1, 2, 3]}, request_id=2),
        frame_of(rows_of(2, 3), {5: [0, 1]}, request_id=3),
        frame_of(rows_of(2, 4), {5: [1]}, layer_id=2, request_id=4),
    ]
    alone = [answer_rows(bank.compute([frame])[0]) for frame in frames]
    merged = bank.compute(frames)
    assert [answer.request_id for answer in merged] == [1, 2, 3, 4]
    for number, (answer, expected) in enumerate(zip(merged, alone, strict=True)):
        if native is not None or number >= 2:  # the last two share no expert
            assert torch.equal(answer_rows(answer), expected)
        torch.testing.assert_close(answer_rows(answer), expected)
    assert bank.compute([]) == []


@pytest.mark.parametrize("num_frames", [1, 3])
def test_experts_of_unequal_sizes_give_what_each_gives_by_itself(num_frames: int) -> None:
    experts = [
        GatedFfnExpert(on_host(GatedFfnWeights(*map(torch.randn, shapes))), "silu", 1)
        for shapes in (((2 * size, HIDDEN), (HIDDEN, size)) for size in (96, 40))
    ]
    unequal, rows = ExpertBank(), rows_of(5)
    for expert_id, expert in enumerate(experts):
        unequal.hold(ExpertKey(MODEL, 0, expert_id), expert)
    expected = torch.cat([results(experts[0], rows[:3]), results(experts[1], rows[3:])])
    frames = [frame_of(rows, {0: [0, 1, 2], 1: [3, 4]}, 0, number) for number in range(num_frames)]
    for answer in unequal.compute(frames):
        assert_near(answer_rows(answer), expected)


def test_frames_are_merged_into_one_call_per_layer(
    bank: ExpertBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank of experts without native code computes one product per expert."""
    calls: list[tuple[int, ...]] = []
    [grouped] = {expert.grouped for expert in bank.experts.values()}
    expert = type(next(iter(bank.experts.values())))
    product = expert.__call__

    def computed_alone(self: object, rows: np.ndarray) -> np.ndarray:
        calls.append((rows.shape[0],))
        return product(self, rows)  # type: ignore[arg-type]

    def computed_together(experts: Sequence[object], counts: tuple[int, ...], rows: Buffer) -> Any:
        calls.append(counts)
        return grouped(experts, counts, rows)

    monkeypatch.setattr(expert, "__call__", computed_alone)
    if grouped is not None:
        for held in bank.experts.values():
            held.grouped = computed_together
    frames = [frame_of(rows_of(4, i), {1: [0, 1], 2: [3]}) for i in range(3)]
    bank.compute([*frames, frame_of(rows_of(4), {2: [0]}), frame_of(rows_of(4), {1: [0]}, 2)])
    assert calls == ([(6, 4), (1,)] if grouped is not None else [(6,), (4,), (1,)])
    counted = {(0, 1): 6, (0, 2): 4, (2, 1): 1}
    assert bank.tokens == {ExpertKey(MODEL, *place): rows for place, rows in counted.items()}


class Numbered:
    """An expert that adds its number."""

    kernel_class = ""
    num_bytes = 0
    row_shape: tuple[int, ...] = (4,)
    dtype = "float32"
    grouped = None

    def __init__(self, number: int) -> None:
        self._number = number

    def takes(self, row_shape: tuple[int, ...]) -> bool:
        return row_shape == self.row_shape

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return rows + self._number


def test_many_experts_results_are_in_order_as_few_are() -> None:
    many = ExpertBank()
    for expert_id in range(70):
        many.hold(ExpertKey(MODEL, 0, expert_id), Numbered(expert_id))
    for count in (1, MAX_PIECES, MAX_PIECES + 1, 70):
        [answer] = many.compute([frame_of(torch.zeros(count, 4), {e: [e] for e in range(count)})])
        assert isinstance(answer, RowsFrame)
        assert len(answer.rows) == (count if count <= MAX_PIECES else 1)
        assert answer_rows(answer)[:, 0].tolist() == list(range(count))


GOOD = frame_of(rows_of(3, 5), {1: [0, 2], 2: [1]}, request_id=77)
BAD: dict[str, tuple[DispatchFrame, type[Exception], str]] = {
    "expert": (frame_of(rows_of(1), {1: [0], 8: [0]}), WrongPlacementError, "expert 8 of layer 0"),
    "layer": (frame_of(rows_of(1), {1: [0]}, layer_id=3), WrongPlacementError, "layer 3"),
    "model": (GOOD._replace(model="other"), WrongPlacementError, "not held"),
    "hidden size": (
        frame_of(torch.zeros(2, HIDDEN + 1), {1: [0]}), FrameError, "must be [64] (given: [65])"
    ),
    "dtype": (frame_of(rows_of(1, 0, "bfloat16"), {1: [0]}), FrameError, "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_frame_that_does_not_fit_is_refused_and_disturbs_no_other(
    bank: ExpertBank, name: str
) -> None:
    frame, error_class, words = BAD[name]
    [alone] = bank.compute([GOOD])
    counted = sum(bank.tokens.values())
    before, refused, after = bank.compute([GOOD, frame._replace(request_id=5), GOOD])
    assert isinstance(refused, ErrorFrame)
    assert (refused.request_id, refused.kind) == (5, error_class.__name__)
    assert isinstance(refused.error, error_class)
    assert words in str(refused.error)
    for answer in (before, after):
        assert answer.request_id == 77
        torch.testing.assert_close(answer_rows(answer), answer_rows(alone))
    assert sum(bank.tokens.values()) == counted + 2 * 3  # the refused frame ran nothing


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that only roundings differ: of sums, and of what torch rounds between products."""
    error = 1e-5 if got.dtype == torch.float32 else 0.02
    torch.testing.assert_close(got, expected, rtol=error, atol=error * float(expected.abs().max()))


# Experts that fail, and rows of other shapes.


class Fragile(Numbered):
    """An expert of rows of two axes that makes sums, and fails for rows that begin with 13."""

    row_shape: tuple[int, ...] = (-1, 2)

    def takes(self, row_shape: tuple[int, ...]) -> bool:
        return len(row_shape) == 2 and row_shape[1] == 2

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if bool((rows[:, 0, 0] == 13).any()):
            raise ExpertFailedError("does not like 13", "fragile")
        return rows.sum(axis=(1, 2), dtype=rows.dtype)[:, None]


def frame_of_rows(rows: torch.Tensor, expert_id: int = 1, request_id: int = 1) -> DispatchFrame:
    return frame_of(torch.zeros(1, 4), {expert_id: [0]})._replace(
        request_id=request_id,
        num_rows=len(rows),
        row_shape=tuple(rows.shape[1:]),
        num_tokens_per_expert=(len(rows),),
        rows=to_bytes(rows),
    )


def test_rows_of_several_axes_and_lengths_have_answers_of_another_shape() -> None:
    bank = ExpertBank()
    bank.hold(ExpertKey(MODEL, 0, 1), Fragile(0))
    asked = [torch.ones(2, 3, 2), torch.ones(1, 5, 2), torch.full((3, 3, 2), 2.0)]
    answers = bank.compute([frame_of_rows(rows) for rows in asked])
    sums = [answer_rows(answer).tolist() for answer in answers]
    assert sums == [[[6.0], [6.0]], [[10.0]], [[12.0], [12.0], [12.0]]]
    [refused] = bank.compute([frame_of_rows(torch.ones(2, 3))])
    assert isinstance(refused, ErrorFrame)
    assert refused.kind == "FrameError"
    assert "[-1, 2]" in str(refused.error)


@pytest.mark.parametrize("num_good", [0, 1, 3])
def test_an_expert_that_fails_fails_the_frame_of_its_rows_and_no_other(num_good: int) -> None:
    bank = ExpertBank()
    bank.hold(ExpertKey(MODEL, 0, 1), Fragile(0))
    good = [frame_of_rows(torch.ones(2, 3, 2), request_id=i) for i in range(num_good)]
    bad = frame_of_rows(torch.full((2, 3, 2), 13.0), request_id=77)
    *answers, failure = bank.compute([*good, bad])
    assert isinstance(failure, ErrorFrame)
    again = decode(b"".join(encode(failure)))
    assert isinstance(again, ErrorFrame)
    for error in (failure.error, again.error):
        assert isinstance(error, ExpertFailedError)
    assert (failure.request_id, failure.error.field) == (77, "fragile")
    assert [answer_rows(answer).tolist() for answer in answers] == [[[6.0], [6.0]]] * num_good
    assert sum(bank.tokens.values()) == 2 * num_good  # the failed rows are not computed
