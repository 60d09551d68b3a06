"""Tensors over received bytes and bytes over tensors, natively and by torch alone."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
import torch

from cluster import native as built
from cluster.wire import tensors
from cluster.wire.tensors import TORCH_DTYPES, from_bytes, to_bytes, to_ids

IMPLEMENTATIONS = [None] if built.native is None else [None, built.native]


@pytest.fixture(
    params=IMPLEMENTATIONS, ids=lambda native: "torch" if native is None else "native", autouse=True
)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "native", request.param)


def values(num_rows: int, size: int, dtype: str) -> torch.Tensor:
    return torch.arange(num_rows * size).to(TORCH_DTYPES[dtype]).view(num_rows, size)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_rows_are_a_tensor_where_they_lie(dtype: str, num_rows: int) -> None:
    expected = values(num_rows, 3, dtype)
    data = bytearray(b"some" + bytes(to_bytes(expected)))
    rows = from_bytes(memoryview(data)[4:], dtype, num_rows, (3,))
    assert rows.dtype == expected.dtype
    assert rows.is_contiguous()
    assert torch.equal(rows, expected)
    data[4:] = bytes(len(data) - 4)
    assert not rows.any()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_tensors_bytes_are_where_the_tensor_is(dtype: str) -> None:
    rows = values(2, 3, dtype)
    data = to_bytes(rows)
    assert (data.nbytes, len(data), data.format) == (rows.nbytes, rows.nbytes, "B")
    assert bytes(data) == bytes(rows.view(torch.uint8).numpy())
    rows += 1
    assert torch.equal(from_bytes(data, dtype, 2, (3,)), rows)


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
    def made() -> tuple[memoryview, torch.Tensor]:
        rows = values(300, 1000, "float32")
        copied = memoryview(bytes(to_bytes(rows)))
        return to_bytes(rows), from_bytes(copied, "float32", 300, (1000,))

    data, piece = made()
    gc.collect()
    others = [torch.full((300, 1000), 7.0) for _ in range(20)]  # would take the memory
    assert torch.equal(from_bytes(data, "float32", 300, (1000,)), values(300, 1000, "float32"))
    assert torch.equal(piece, values(300, 1000, "float32"))
    assert len(others) == 20


def test_memory_is_let_go_with_what_was_made_of_it() -> None:
    data = bytearray(bytes(to_bytes(values(8, 2, "bfloat16"))))
    pieces = from_bytes(memoryview(data), "bfloat16", 8, (2,)).split_with_sizes((3, 5))
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
        received = from_bytes(memoryview(bytes(to_bytes(whole))), "bfloat16", 9, (64,))
        for piece, rows in zip(received.split((4, 5)), whole.split((4, 5)), strict=True):
            assert torch.equal(piece @ weight, rows.clone() @ weight)


def test_memory_that_cannot_be_is_refused_natively() -> None:
    for one in IMPLEMENTATIONS[1:]:
        assert one is not None
        with pytest.raises(ValueError, match="memory"):
            one.view(None, 0, 1)
        with pytest.raises(ValueError, match="memory"):
            one.view(None, 16, -1)
        with pytest.raises(OverflowError):
            one.view(None, 1 << 70, 1)
        with pytest.raises(TypeError):
            one.view(None, "16", 1)
