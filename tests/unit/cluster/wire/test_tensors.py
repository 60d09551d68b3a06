"""Tensors over received bytes and bytes over tensors, natively and by torch alone."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
import torch

from cluster.native import built
from cluster.wire import tensors
from cluster.wire.tensors import TORCH_DTYPES, from_bytes, pieces_of, to_bytes, to_ids

IMPLEMENTATIONS = [None] if built.native is None else [None, built.native]


@pytest.fixture(
    params=IMPLEMENTATIONS, ids=lambda native: "torch" if native is None else "native", autouse=True
)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "native", request.param)


def values(num_rows: int, size: int, dtype: str) -> torch.Tensor:
    return torch.arange(num_rows * size).to(TORCH_DTYPES[dtype]).view(num_rows, size)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("counts", [(1,), (5,), (1, 3, 2), (1,) * 40])
def test_rows_are_taken_apart_where_they_lie(dtype: str, counts: tuple[int, ...]) -> None:
    whole = values(sum(counts), 3, dtype)
    data = bytearray(b"some" + bytes(to_bytes(whole)))
    pieces = pieces_of(memoryview(data)[4:], dtype, counts, 3)
    for piece, expected in zip(pieces, whole.split(counts), strict=True):
        assert piece.dtype == expected.dtype
        assert piece.is_contiguous()
        assert torch.equal(piece, expected)
    data[4:] = bytes(len(data) - 4)
    assert not any(piece.any() for piece in pieces)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_tensors_bytes_are_where_the_tensor_is(dtype: str) -> None:
    rows = values(2, 3, dtype)
    data = to_bytes(rows)
    assert (data.nbytes, len(data), data.format) == (rows.nbytes, rows.nbytes, "B")
    assert bytes(data) == bytes(rows.view(torch.uint8).numpy())
    rows += 1
    assert torch.equal(from_bytes(data, dtype, 2, 3), rows)


def test_what_does_not_lie_together_and_what_is_empty_have_bytes_too() -> None:
    rows = values(4, 6, "float32")
    assert bytes(to_bytes(rows.t())) == rows.numpy().T.tobytes()
    assert bytes(to_bytes(rows[:, ::2])) == np.ascontiguousarray(rows.numpy()[:, ::2]).tobytes()
    assert bytes(to_bytes(rows[:0])) == b""


CHOSEN = torch.arange(12).view(4, 3)


@pytest.mark.parametrize(
    "ids",
    [CHOSEN, CHOSEN.int(), CHOSEN.T, CHOSEN[:, :2], CHOSEN[:1, :1], CHOSEN[:0]],
    ids=["whole", "int32", "turned", "a part", "one", "none"],
)
def test_choices_are_the_same_in_numpy(ids: torch.Tensor) -> None:
    array = to_ids(ids)
    assert (array.dtype, array.shape) == (np.int64, tuple(ids.shape))
    assert array.tolist() == ids.tolist()


def test_memory_lasts_as_long_as_what_is_made_of_it() -> None:
    def made() -> tuple[memoryview, list[torch.Tensor]]:
        rows = values(300, 1000, "float32")
        return to_bytes(rows), pieces_of(memoryview(bytes(to_bytes(rows))), "float32", (300,), 1000)

    data, [piece] = made()
    gc.collect()
    others = [torch.full((300, 1000), 7.0) for _ in range(20)]  # would take the memory
    assert torch.equal(from_bytes(data, "float32", 300, 1000), values(300, 1000, "float32"))
    assert torch.equal(piece, values(300, 1000, "float32"))
    assert len(others) == 20


def test_memory_is_let_go_with_what_was_made_of_it() -> None:
    data = bytearray(bytes(to_bytes(values(8, 2, "bfloat16"))))
    pieces = pieces_of(memoryview(data), "bfloat16", (3, 5), 2)
    with pytest.raises(BufferError):
        data.append(1)
    del pieces
    data.append(1)
    rows = values(8, 2, "float32")
    before = sys.getrefcount(rows)
    for _ in range(100):
        to_bytes(rows)
    assert sys.getrefcount(rows) == before


def test_products_of_pieces_have_the_bits_of_products_of_the_rows() -> None:
    whole = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.inference_mode():
        pieces = pieces_of(memoryview(bytes(to_bytes(whole))), "bfloat16", (4, 5), 64)
        for piece, rows in zip(pieces, whole.split((4, 5)), strict=True):
            assert torch.equal(piece @ weight, rows.clone() @ weight)


WRONG = {
    "more rows than there are": (memoryview(bytes(16)), (3, 2), 1, 4, False),
    "fewer than none": (memoryview(bytes(16)), (-1,), 1, 4, False),
    "too large a number": (memoryview(bytes(16)), (2**70,), 1, 4, False),
    "no number": (memoryview(bytes(16)), ("1",), 1, 4, False),
    "no values": (memoryview(bytes(16)), (1,), 0, 4, False),
    "too long rows": (memoryview(bytes(16)), (1,), 2**62, 4, False),
    "no bytes a value": (memoryview(bytes(16)), (1,), 1, 0, False),
    "no view": (bytes(16), (1,), 1, 4, False),
    "a list": (memoryview(bytes(16)), [1], 1, 4, False),
    "a view with gaps": (memoryview(bytes(16))[::2], (1,), 1, 4, False),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers_are_refused_natively(case: str) -> None:
    for one in IMPLEMENTATIONS[1:]:
        assert one is not None
        with pytest.raises((ValueError, TypeError, OverflowError, BufferError), match=r"\w"):
            one.pieces(*WRONG[case])
        with pytest.raises((ValueError, TypeError, OverflowError), match=r"\w"):
            one.view(None, 0, 1)
        with pytest.raises((ValueError, TypeError, OverflowError), match=r"\w"):
            one.view(None, 16, -1)


def test_pieces_of_which_no_tensor_is_made_let_the_memory_go() -> None:
    for one in IMPLEMENTATIONS[1:]:
        assert one is not None
        data = bytearray(16)
        capsules = one.pieces(memoryview(data), (1, 2), 1, 4, False)
        with pytest.raises(BufferError):
            data.append(1)
        del capsules
        data.append(1)
