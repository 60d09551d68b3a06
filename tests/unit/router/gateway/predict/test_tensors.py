"""Tensors from bytes and lists and back: nothing is lost, and nothing wrong gets through."""

from __future__ import annotations

import json
import math
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cluster.errors import InvalidRequestError, NotFiniteError
from experts.mixture.parts import Input
from router.gateway.predict.validate import RawTensor, checked_array, json_list
from router.messages.tensor_bytes import (
    NUMPY_DTYPES,
    TEXT,
    array_of,
    bytes_of,
    datatype_of,
)
from tests.unit.router.gateway.predict.v2_calls import outcome

DATATYPES = sorted(NUMPY_DTYPES)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def arrays(datatype: str, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    dtype = NUMPY_DTYPES[datatype]
    options: dict[str, Any] = {}
    if dtype.kind == "f":
        width = 8 * dtype.itemsize
        options["elements"] = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return hnp.arrays(dtype, shape, **options)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Input, np.ndarray]:
    """An input and an array for it."""
    datatype = draw(st.sampled_from(DATATYPES))
    row, rows = draw(SHAPES), draw(st.integers(1, 4))
    array = draw(arrays(datatype, (rows, *row)))
    if len(row) > 1 and draw(st.booleans()):
        row = (-1, *row[1:])
    return Input(name="x", datatype=datatype, shape=row), array


def same(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert one.tobytes() == other.tobytes()


@given(tensors())
def test_an_input_survives_bytes_and_lists(case: tuple[Input, np.ndarray]) -> None:
    spec, array = case
    shape = array.shape
    same(checked_array(RawTensor("x", spec.datatype, shape, bytes_of(array)), spec), array)
    flat, nested = json_list(array, "x"), array.tolist()
    for data in (flat, nested):
        sent = json.loads(json.dumps(data))
        same(checked_array(RawTensor("x", spec.datatype, shape, sent), spec), array)


@given(hnp.arrays(np.str_, SHAPES, elements=st.text(max_size=9).filter(lambda t: "\0" not in t)))
@example(np.array([["ä", ""], ["🙂🙂", "x" * 300]]))
def test_texts_survive_bytes(array: np.ndarray) -> None:
    try:
        data = bytes_of(array)
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    assert datatype_of(array) == TEXT
    back = array_of(TEXT, array.shape, data)
    assert back.shape == array.shape
    assert back.tolist() == array.tolist()
    lengths = [len(text.encode()) for text in array.ravel().tolist()]
    assert len(data) == 4 * array.size + sum(lengths)


@settings(max_examples=300)
@given(
    st.sampled_from([*DATATYPES, TEXT]),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.binary(max_size=64),
)
@example(TEXT, (1,), struct.pack("<I", 2**32 - 1))
@example(TEXT, (2**40,), b"")
@example("FP64", (2**40, 2**40), b"12345678")
@example("BOOL", (2,), b"\1\2")
def test_any_bytes_are_an_array_or_a_value_error(
    datatype: str, shape: tuple[int, ...], data: bytes
) -> None:
    try:
        array = array_of(datatype, shape, memoryview(data))
    except ValueError:
        return
    assert array.shape == shape
    if datatype != TEXT:
        assert bytes_of(array) == data


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.integers(2**70, 2**2000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


@settings(max_examples=300)
@given(
    st.sampled_from(DATATYPES),
    JSON,
    st.lists(st.integers(0, 3) | JSON, max_size=4),
    st.lists(JSON, max_size=6) | st.binary(max_size=40),
)
def test_any_tensor_is_an_array_or_a_typed_error_that_names_it(
    datatype: str, sent_datatype: object, shape: list[Any], data: Any
) -> None:
    spec = Input(name="x", datatype=datatype, shape=(-1, 2))
    for named in (sent_datatype, datatype):
        raw = RawTensor("x", named, shape, data)
        array = outcome(partial(checked_array, raw, spec))
        if isinstance(array, InvalidRequestError):
            assert array.field.startswith("inputs.x")
            assert 0 < len(array.message) < 500
        else:
            assert array.shape == tuple(shape)
            assert array.dtype == NUMPY_DTYPES[datatype]
            assert np.isfinite(array).all()


def refusal(datatype: str, row: tuple[int, ...], shape: list[Any], data: Any) -> str:
    spec = Input(name="x", datatype=datatype, shape=row)
    with pytest.raises(InvalidRequestError) as caught:
        checked_array(RawTensor("x", datatype, shape, data), spec)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1.5, "a"], "inputs.x: data[1]: must be a number; got 'a'"),
        ([1.5, True], "inputs.x: data[1]: must be a number; got True"),
        ([1.5], "inputs.x: data has 1 values; its shape needs 2"),
        ([[1.5]], "inputs.x: data has a list of 1 on axis 1; its shape needs a list of 2"),
        ([[1.5, 2], 3], "inputs.x: data has a list of 2 on axis 0; its shape needs a list of 1"),
        ([[[1.5], 2]], "inputs.x: data[0]: must be a number; got a list of 1"),
        ([0.5, math.inf], "inputs.x: row 0 has inf; all values must be finite in FP32"),
        ([0.5, -1e39], "inputs.x: row 0 has -inf; all values must be finite in FP32"),
        ([0.5, 10**400], "inputs.x: data has an integer that is too large for a float"),
        (struct.pack("<2f", 1, math.nan), "inputs.x: row 0 has nan; all values must be finite"),
        (b"1234567", "inputs.x: has 7 bytes, must have 8: 2 values of FP32"),
    ],
)
def test_wrong_numbers_are_refused_with_their_place(data: Any, message: str) -> None:
    assert refusal("FP32", (2,), [1, 2], data).startswith(message)


@pytest.mark.parametrize(
    ("datatype", "value", "allowed"),
    [
        ("UINT8", 256, "an integer from 0 to 255"),
        ("INT32", 2**31, "an integer of 32 bits"),
        ("INT64", 2**63, "an integer of 64 bits"),
        ("INT64", 10**400, "an integer of 64 bits"),
        ("INT64", 1.0, "an integer of 64 bits"),
        ("BOOL", 1, "true or false"),
    ],
)
def test_values_out_of_their_datatypes_range(datatype: str, value: Any, allowed: str) -> None:
    assert f"must be {allowed}" in refusal(datatype, (1,), [1, 1], [value])


@pytest.mark.parametrize(
    "shape",
    [[2], [1, 3], [1, 2, 1], [0, 2], [1, 0], [-1, 2], [1, -1], [2**40, 2], [1.0, 2], ["1", 2],
     [True, 2], [None, 2], [], [10**3000, 2]],
)  # fmt: skip
def test_wrong_shapes_are_refused_before_the_data_is_looked_at(shape: list[Any]) -> None:
    assert refusal("FP32", (2,), shape, b"never looked at").startswith("inputs.x.shape")


def test_json_has_no_number_for_an_infinity() -> None:
    with pytest.raises(NotFiniteError, match="row 1 has -inf, which JSON cannot represent"):
        json_list(np.array([[0.0], [-np.inf]]), "outputs.x")


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.complex64, object, "S3"])
def test_an_array_without_a_datatype_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="allowed: bool, uint8"):
        datatype_of(np.zeros(1, dtype))


def test_big_endian_arrays_are_sent_as_little_endian_ones() -> None:
    array = np.array([1.5, -2.0], ">f4")
    assert datatype_of(array) == "FP32"
    same(array_of("FP32", (2,), bytes_of(array)), array.astype("<f4"))
