"""Wrong numbers to native attention and native caches: a typed error, nothing beyond is touched."""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cluster import native as built

BUILT = [] if built.native is None else [built.native]
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
# Two sequences of float32, G 1, Q 2, D 3, V 3, N 3: tokens 17 and 18 of one, the first of another.
SIZES = (FLOAT32, 3, 3, 1, 2, 3, 3, 6, 3)
SPANS = (0, 2, 17, 0, 2, 1, 0, 2)
PAGES = (2, 0, 1)
SCORING = (1.0, 0.0, 0)
KEYS = VALUES = 3 * 16 * 3 * 4


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def attended(
    native: ModuleType,
    queries: int = 3 * 6 * 4,
    keys: int = KEYS,
    values: int | None = VALUES,
    spans: tuple[int, ...] = SPANS,
    pages: tuple[int, ...] = PAGES,
    room: int = 3 * 2 * 3 * 4,
    sizes: object = SIZES,
    scoring: object = SCORING,
    sinks: int | None = None,
    threads: object = 1,
    kernel: object = None,
) -> None:
    native.attend(
        bytes(queries),
        bytes(keys),
        None if values is None else bytes(values),
        numbers(*spans),
        numbers(*pages),
        bytearray(room),
        sizes,
        scoring,
        None if sinks is None else bytes(sinks),
        threads,
        kernel,
    )


STORED = (BFLOAT16, 1, 2, 2, 3, 6, 3)  # format, columns, N, G, D, strides


def stored(
    native: ModuleType,
    sizes: object = STORED,
    rows: int = 2 * 6 * 2,
    room: int = 2 * 2 * 16 * 4 * 2,
    slots: tuple[int, ...] = (31, 0),
) -> None:
    native.store(bytes(rows), bytearray(room), numbers(*slots), sizes)


def but(given: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*given[:place], value, *given[place + 1 :])


LATENTS = (FLOAT32, 3, 3, 1, 2, 3, 2, 6, 3)
WRONG = {
    "a page too large": lambda n: attended(n, pages=(2, 0, 3)),
    "a page below": lambda n: attended(n, pages=(2, -1, 1)),
    "too few pages": lambda n: attended(n, pages=(2, 0)),
    "no spans": lambda n: attended(n, spans=()),
    "a span cut short": lambda n: attended(n, spans=SPANS[:7]),
    "too few tokens": lambda n: attended(n, spans=SPANS[:4]),
    "tokens twice": lambda n: attended(n, spans=but(SPANS, 4, 1)),
    "tokens left out": lambda n: attended(n, spans=but(SPANS, 0, 1)),
    "too many tokens": lambda n: attended(n, spans=but(SPANS, 5, 2)),
    "a token that is none": lambda n: attended(n, spans=but(SPANS, 5, 0)),
    "a position below": lambda n: attended(n, spans=but(SPANS, 2, -1)),
    "a position beyond the pages": lambda n: attended(n, spans=but(SPANS, 2, 47)),
    "pages from below on": lambda n: attended(n, spans=but(SPANS, 3, -1)),
    "pages from beyond on": lambda n: attended(n, spans=but(SPANS, 7, 3)),
    "too few queries": lambda n: attended(n, queries=3 * 6 * 4 - 4),
    "too few keys": lambda n: attended(n, keys=KEYS - 4),
    "too many keys": lambda n: attended(n, keys=KEYS + 4),
    "too few values": lambda n: attended(n, values=VALUES - 4),
    "too many values": lambda n: attended(n, values=VALUES + 4),
    "latents larger than keys": lambda n: attended(
        n, values=None, sizes=but(LATENTS, 6, 4), room=3 * 2 * 4 * 4
    ),
    "latents of two heads": lambda n: attended(
        n, values=None, sizes=but(LATENTS, 3, 2), keys=2 * KEYS, room=48
    ),
    "no room": lambda n: attended(n, room=68),
    "too much room": lambda n: attended(n, room=76),
    "too few sinks": lambda n: attended(n, sinks=4),
    "no thread": lambda n: attended(n, threads=0),
    "threads of another type": lambda n: attended(n, threads="1"),
    "no such kernel": lambda n: attended(n, kernel="avx1024"),
    "a kernel of another type": lambda n: attended(n, kernel=1),
    "too few sizes, another type": lambda n: attended(n, sizes=SIZES[:8]),
    "sizes of another type": lambda n: attended(n, sizes=list(SIZES)),
    "scoring of another type": lambda n: attended(n, scoring=list(SCORING)),
    "scaling of another type": lambda n: attended(n, scoring=("1", 0.0, 0)),
    "softcap below": lambda n: attended(n, scoring=(1.0, -1.0, 0)),
    "softcap that is no number": lambda n: attended(n, scoring=(1.0, float("nan"), 0)),
    "window below": lambda n: attended(n, scoring=(1.0, 0.0, -1)),
    **{
        f"attend, size {place} is {value}": lambda n, place=place, value=value: attended(
            n, sizes=but(SIZES, place, value)
        )
        for place in range(9)
        for value in (-1, *((0,) if 0 < place < 7 else ()), 3 if place == 0 else 2**62)
    },
    "store, too few rows": lambda n: stored(n, rows=2 * 6 * 2 - 2),
    "store, a cache too small": lambda n: stored(n, room=2 * 2 * 16 * 4 * 2 - 2),
    "store, a cache too large": lambda n: stored(n, room=2 * 2 * 16 * 4 * 2 + 2),
    "store, a slot too large": lambda n: stored(n, slots=(32, 0)),
    "store, a slot below": lambda n: stored(n, slots=(-1, 0)),
    "store, no slots": lambda n: stored(n, slots=()),
    "store, sizes of another type": lambda n: stored(n, sizes=list(STORED)),
    **{
        f"store, size {place} is {value}": lambda n, place=place, value=value: stored(
            n, sizes=but(STORED, place, value)
        )
        for place in range(7)
        for value in (-1, *((0,) if 1 < place < 5 else ()), 3 if place < 2 else 2**62)
    },
}


@pytest.mark.parametrize("native", BUILT)
def test_what_the_wrong_cases_start_from_is_right(native: ModuleType) -> None:
    attended(native)
    attended(native, values=None, sizes=LATENTS, room=48)
    attended(native, sinks=8, scoring=(1.0, 30.0, 2**62), threads=2**40)
    for kernel, _ in native.attention_kernels():
        attended(native, kernel=kernel)
    stored(native)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("native", BUILT)
def test_wrong_numbers_are_refused_and_nothing_beyond_is_touched(
    case: str, native: ModuleType
) -> None:
    with pytest.raises(TypeError if "type" in case else ValueError, match=r"\w"):
        WRONG[case](native)


@pytest.mark.parametrize("native", BUILT)
def test_buffers_are_let_go(native: ModuleType) -> None:
    out, cached, keys = bytearray(72), bytearray(512), bytearray(KEYS)
    queries, values = bytearray(72), bytearray(VALUES)
    given = (queries, keys, values, numbers(*SPANS), numbers(*PAGES), out, SIZES, SCORING, None)
    for threads in (1, 0):
        with suppress(ValueError):
            native.attend(*given, threads, None)
    native.store(bytes(24), cached, numbers(31, 0), STORED)
    for buffer in (queries, keys, values, out, cached):
        buffer.append(1)  # no view of it is held any more
