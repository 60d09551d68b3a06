"""numpy's arrays over received bytes, and their numbers against torch's."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from cluster.wire.arrays import DTYPES, array_of, bytes_of
from cluster.wire.tensors import TORCH_DTYPES, from_array, to_array

FLOATS = ("float32", "bfloat16", "float16")


def numbers(dtype: str) -> torch.Tensor:
    """Every number of 16 bits; of float32, many of all sizes and all ties between two of 16."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    if dtype != "float32":
        return bits.to(torch.int16).view(TORCH_DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=generator)
    ties = torch.cat((bits << 16, (bits << 16) + (1 << 15), (bits << 13) + (1 << 12)))
    return torch.cat((any_bits.to(torch.int32), ties)).view(torch.float32)


def test_every_dtype_of_a_frame_has_its_name() -> None:
    assert DTYPES.keys() == TORCH_DTYPES.keys()
    for name, dtype in DTYPES.items():
        assert (dtype.name, dtype.itemsize) == (name, TORCH_DTYPES[name].itemsize)


@pytest.mark.parametrize("name", DTYPES)
def test_rows_are_an_array_where_they_lie(name: str) -> None:
    expected = np.arange(12).reshape(2, 3, 2).astype(DTYPES[name])
    data = bytearray(b"some" + bytes(bytes_of(expected)))
    rows = array_of(memoryview(data)[4:], name, 2, (3, 2))
    assert rows.dtype == DTYPES[name]
    assert np.array_equal(rows, expected)
    data[4:] = bytes(len(data) - 4)
    assert not rows.any()
    assert bytes(bytes_of(expected[:, ::2])) == expected[:, ::2].tobytes()
    assert array_of(b"", name, 0, (3,)).shape == (0, 3)


@pytest.mark.parametrize("name", DTYPES)
def test_an_array_is_a_tensor_and_back_without_a_copy(name: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[name])
    tensor = from_array(array)
    assert tensor.dtype == TORCH_DTYPES[name]
    back = to_array(tensor)
    assert back.dtype == array.dtype
    tensor[1, 2] = 7
    assert back[1, 2] == array[1, 2] == 7
    assert to_array(torch.nn.Parameter(tensor)).tobytes() == array.tobytes()


@pytest.mark.parametrize(("stored", "served"), permutations(FLOATS, 2))
@np.errstate(over="ignore", invalid="ignore")
def test_numbers_are_rounded_as_torch_rounds_them(stored: str, served: str) -> None:
    given = numbers(stored)
    got = from_array(to_array(given).astype(DTYPES[served]))
    right = given.to(TORCH_DTYPES[served])
    is_number = ~right.isnan()
    assert torch.equal(got.isnan(), right.isnan())
    integers = torch.int32 if served == "float32" else torch.int16
    assert torch.equal(got.view(integers)[is_number], right.view(integers)[is_number])
