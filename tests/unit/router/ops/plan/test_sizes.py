"""Sizes as people write and read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from router.ops.plan.sizes import UNITS, format_count, format_size, parse_size


def test_sizes_are_read() -> None:
    sizes = {"80GiB": 80 * 1024**3, "1.5 TB": 15 * 10**11, "1B": 1, "0.5KiB": 512}
    assert {text: parse_size(text, "--x") for text in sizes} == sizes


@pytest.mark.parametrize(
    "text",
    ["", "24", "GB", "24gb", "24Gb", "24 gigabytes", "-1GB", "1e3GB", "1,5GB", "0GB", " 1GB"],
)
def test_anything_else_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text, "--device-memory")
    assert caught.value.field == "--device-memory"
    assert repr(text) in caught.value.message


@pytest.mark.parametrize(
    ("written", "number", "text"),
    [
        (format_size, 0, "0 B"),
        (format_size, 999, "999 B"),
        (format_size, 1000, "1.00 KB"),
        (format_size, 352_321_536, "352 MB"),
        (format_size, 999_999_999, "1.00 GB"),
        (format_size, 1_342_053_000_000, "1.34 TB"),
        (format_size, 12_345_000_000_000_000, "12,345 TB"),
        (format_count, 2_036_864, "2.04 million"),
        (format_count, 46_702_792_704, "46.7 billion"),
        (format_count, 999_999_999, "1.00 billion"),
        (format_count, 12_345, "12,345"),
    ],
)
def test_sizes_and_counts_are_written_with_three_digits(
    written: Callable[[int], str], number: int, text: str
) -> None:
    assert written(number) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_what_is_written_is_read_back_within_half_a_percent(size_bytes: int) -> None:
    read = parse_size(format_size(size_bytes).replace(",", ""), "")
    assert read == pytest.approx(size_bytes, rel=0.0051)
    assert format_size(size_bytes).split(" ")[1] in UNITS
