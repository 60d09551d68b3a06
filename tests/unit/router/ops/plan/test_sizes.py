"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from router.ops.plan.sizes import UNITS, format_count, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GB", 24_000_000_000),
        ("80GiB", 80 * 1024**3),
        ("1.5 TB", 1_500_000_000_000),
        ("1B", 1),
        ("0.5KiB", 512),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text, "--x") == size_bytes


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
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (352_321_536, "352 MB"),
        (24_000_000_000, "24.0 GB"),
        (999_999_999, "1.00 GB"),
        (1_342_053_000_000, "1.34 TB"),
        (12_345_000_000_000_000, "12,345 TB"),
    ],
)
def test_sizes_are_written_with_three_digits(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_what_is_written_is_read_back_within_half_a_percent(size_bytes: int) -> None:
    read = parse_size(format_size(size_bytes).replace(",", ""), "")
    assert read == pytest.approx(size_bytes, rel=0.0051)
    assert format_size(size_bytes).split(" ")[1] in UNITS


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (2_036_864, "2.04 million"),
        (46_702_792_704, "46.7 billion"),
        (671_026_419_200, "671 billion"),
        (999_999_999, "1.00 billion"),
        (12_345, "12,345"),
    ],
)
def test_counts_are_written_with_three_digits(count: int, text: str) -> None:
    assert format_count(count) == text
