"""What native functions refuse: numbers and buffers that do not fit; nothing beyond is touched.

Dimension letters: H hidden size, Q query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from cluster.native import native

assert native is not None
FLOAT32, BFLOAT16 = 0, 1
H, Q, G, D = 40, 4, 2, 6
OUTPUTS = (Q + 2 * G) * D
TOKENS, PAGES = 3, 2
Arguments = dict[str, Any]
"""The arguments of a call, in their order, or those of them that are wrong."""


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def but(given: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*given[:place], value, *given[place + 1 :])


def sizes_of(given: tuple[Any, ...], wrong: dict[int, tuple[int, ...]]) -> dict[str, Arguments]:
    """Return cases with a wrong size each."""
    return {
        f"size {place} is {value}": {"sizes": but(given, place, value)}
        for place, values in wrong.items()
        for value in values
    }


IDS, PAIRS = numbers(0, 1, 2, 0), numbers(0, 1, 2, 3)
RIGHT: dict[str, Arguments] = {
    "summands_of": {"ids": IDS, "k": 2, "room": np.empty(4, np.int64)},
    "route": {
        "ids": IDS, "k": 2, "ordered_ids": numbers(0, 1, 2), "ends": numbers(3), "pairs": PAIRS,
        "room": np.empty(4, np.int64),
    },
    "gather": {"values": bytes(8), "pairs": PAIRS, "k": 2, "row_bytes": 4},
    "combine": {
        "pieces": [(PAIRS, bytes(16))], "weights": bytes(16), "summand_of": PAIRS, "k": 2,
        "room": bytearray(8), "value_bytes": 4,
    },
    # Two sequences, G 1, Q 2, D 3: tokens 17 and 18 of one, the first of another.
    "attend": {
        "queries": bytes(72), "keys": bytes(576), "values": bytes(576),
        "spans": numbers(0, 2, 17, 0, 2, 1, 0, 2), "pages": numbers(2, 0, 1), "out": bytearray(72),
        "sizes": (FLOAT32, 3, 3, 1, 2, 3, 3, 6, 3), "scoring": (1.0, 0.0, 0), "sinks": None,
        "threads": 1, "kernel": None,
    },
    "store": {
        "rows": bytes(24), "cache": bytearray(512), "slots": numbers(31, 0),
        "sizes": (BFLOAT16, 1, 2, 2, 3, 6, 3),  # format, columns, pages, G, D, strides
    },
    "attention_inputs": {
        "rows": bytes(4 * 7 * H), "norm": bytes(4 * H), "packed": bytes(4 * (H * 64 + 64)),
        "angles": bytes(4 * 7 * D), "head_norms": bytes(4 * 2 * D),
        "out": bytearray(4 * 7 * OUTPUTS), "sizes": (H, Q, G, D, 0, 0, 1, 1, D, D),
        "factors": (1e-5, 1e-6, 2.5), "threads": 1, "kernel": None,
    },
    "attention_outputs": {
        "attended": bytes(4 * 24 * 2), "packed": bytes(24 * 64 * 4), "residual": bytes(4 * H * 2),
        "norm": bytes(4 * H), "sums": bytearray(4 * H * 2), "normed": bytearray(4 * H * 2),
        "sizes": (24, H, 0, 0, 0, 1), "epsilon": 1e-5, "threads": 1, "kernel": None,
    },
    "choose": {
        "rows": bytes(64), "packed": bytes(8 * 32 * 4), "correction": bytes(16),
        "allowed": b"\1" * 8, "ids": bytearray(32), "weights": bytearray(16),
        "sizes": (8, 4, 2, 0, 0, 0, 0, 0, 1, 0, 0, 2, 1, 1), "factors": (1.0, -1.0),
        "threads": 1, "kernel": None, "forced": None,
    },
    "normalise": {
        "rows": bytes(64), "weights": bytes(32), "out": bytearray(64), "sizes": (8, 0, 0, 1),
        "epsilon": 1e-5,
    },
    "linear": {
        "rows": bytes(4 * 8 * 3), "packed": bytes(8 * 32 * 4), "out": bytearray(4 * 5 * 3),
        "sizes": (1, 8, 5, 0, 0, 0, 0), "threads": 1, "kernel": None,
    },
    "attention_half": {
        "residual": bytearray(4 * H * TOKENS), "last output": bytes(4 * H * TOKENS),
        "angles": bytes(4 * D * TOKENS), "slots": numbers(1, 2, 3),
        "spans": np.array([[0, TOKENS, 1, 0]]), "pages": numbers(0),
        "out": bytearray(4 * H * TOKENS), "parts": (), "threads": 1,
    },
}  # fmt: skip
PARTS: Arguments = {
    "norm": bytes(4 * H), "inputs": bytes(4 * H * 64), "head norms": None,
    "input sizes": (H, Q, G, D, 0, 0, 0, 1, 0, 0), "input factors": (1e-5, 0.0, 2.5),
    "keys": bytearray(4 * PAGES * 16 * G * D), "values": bytearray(4 * PAGES * 16 * G * D),
    "key sizes": (0, 1, PAGES, G, D, OUTPUTS, D), "value sizes": (0, 0, PAGES, G, D, OUTPUTS, D),
    "heads": (0, 4, PAGES, G, Q, D), "scoring": (0.5, 0.0, 0), "sinks": None, "kernel": None,
    "output": bytes(4 * Q * D * 64), "next norm": bytes(4 * H),
    "output sizes": (Q * D, H, 0, 0, 0, 1), "epsilon": 1e-5,
}  # fmt: skip
RIGHT["attention_half"]["parts"] = tuple(PARTS.values())


def part(name: str, value: Any) -> Arguments:
    """Return the parts of half a layer, one of them wrong."""
    return {"parts": tuple({**PARTS, name: value}.values())}


SIZES = {name: arguments.get("sizes", ()) for name, arguments in RIGHT.items()}
SPANS = tuple(RIGHT["attend"]["spans"].tolist())
LATENTS = but(SIZES["attend"], 6, 2)
ANY = (-1, 2**62)
WRONG: dict[str, dict[str, Arguments]] = {
    "summands_of": {
        "no expert each": {"k": 0},
        "not whole tokens": {"k": 3},
        "no room": {"room": np.empty(3, np.int64)},
    },
    "route": {
        "an id too large": {"ids": IDS + 1},
        "an id below": {"ids": IDS - 1},
        "a pair too large": {"pairs": PAIRS + 1},
        "a pair below": {"pairs": PAIRS - 1},
        "an expert too large": {"ordered_ids": numbers(1, 2, 3)},
        "an expert below": {"ordered_ids": numbers(-1, 0, 1)},
        "a share too large": {"ends": numbers(4)},
        "a share below": {"ends": numbers(-1, 3)},
        "shares that go back": {"ends": numbers(2, 1, 3)},
        "no room": {"room": np.empty(3, np.int64)},
        "no room for all pairs": {"pairs": None, "room": np.empty(3, np.int64)},
        "no expert each": {"k": 0},
        "too many experts each": {"k": 2**62},
    },
    "gather": {
        "too many experts each": {"k": 2**62},
        "too long rows": {"values": b"", "row_bytes": 2**62},
        "a pair too large": {"pairs": PAIRS + 1},
        "a pair below": {"pairs": PAIRS - 1},
        "not whole rows": {"values": bytes(9)},
        "no bytes": {"row_bytes": 0},
        "a number of another type": {"k": "2"},
    },
    "combine": {
        "another's summand": {"summand_of": PAIRS[::-1].copy()},
        "a summand below": {"summand_of": PAIRS - 1},
        "no room": {"room": bytearray(4)},
        "no room at all": {"room": bytearray()},
        "odd values": {"value_bytes": 3},
        "odd weights": {"weights": bytes(12)},
        "no pairs": {
            "pieces": [], "weights": b"", "summand_of": PAIRS[:0].copy(), "room": bytearray()
        },
        "no expert each": {"k": 0},
        "too many experts each": {"k": 2**62},
        "a pair too large": {"pieces": [(PAIRS + 1, bytes(16))]},
        "a pair below": {"pieces": [(PAIRS - 1, bytes(16))]},
        "too few rows": {"pieces": [(PAIRS, bytes(12))]},
        "not whole rows": {"pieces": [(PAIRS, bytes(17))]},
        "pieces of another type": {"pieces": 3},
        "a piece of another type": {"pieces": [3]},
        "rows of another type": {"pieces": [(PAIRS, None)]},
        "pairs of another type": {"pieces": [(None, bytes(16))]},
        "room of another type": {"room": None},
    },
    "attend": {
        "a page too large": {"pages": numbers(2, 0, 3)},
        "a page below": {"pages": numbers(2, -1, 1)},
        "too few pages": {"pages": numbers(2, 0)},
        "no spans": {"spans": numbers()},
        "a span cut short": {"spans": numbers(*SPANS[:7])},
        "too few tokens": {"spans": numbers(*SPANS[:4])},
        "tokens twice": {"spans": numbers(*but(SPANS, 4, 1))},
        "tokens left out": {"spans": numbers(*but(SPANS, 0, 1))},
        "too many tokens": {"spans": numbers(*but(SPANS, 5, 2))},
        "a token that is none": {"spans": numbers(*but(SPANS, 5, 0))},
        "a position below": {"spans": numbers(*but(SPANS, 2, -1))},
        "a position beyond the pages": {"spans": numbers(*but(SPANS, 2, 47))},
        "pages from below on": {"spans": numbers(*but(SPANS, 3, -1))},
        "pages from beyond on": {"spans": numbers(*but(SPANS, 7, 3))},
        "too few queries": {"queries": bytes(68)},
        "too few keys": {"keys": bytes(572)},
        "too many keys": {"keys": bytes(580)},
        "too few values": {"values": bytes(572)},
        "too many values": {"values": bytes(580)},
        "latents larger than keys": {
            "values": None, "sizes": but(LATENTS, 6, 4), "out": bytearray(96)
        },
        "latents of two heads": {
            "values": None, "sizes": but(LATENTS, 3, 2), "keys": bytes(1152), "out": bytearray(48)
        },
        "no room": {"out": bytearray(68)},
        "too much room": {"out": bytearray(76)},
        "too few sinks": {"sinks": bytes(4)},
        "no thread": {"threads": 0},
        "threads of another type": {"threads": "1"},
        "no such kernel": {"kernel": "avx1024"},
        "a kernel of another type": {"kernel": 1},
        "too few sizes, another type": {"sizes": SIZES["attend"][:8]},
        "sizes of another type": {"sizes": list(SIZES["attend"])},
        "scoring of another type": {"scoring": [1.0, 0.0, 0]},
        "scaling of another type": {"scoring": ("1", 0.0, 0)},
        "softcap below": {"scoring": (1.0, -1.0, 0)},
        "softcap that is no number": {"scoring": (1.0, float("nan"), 0)},
        "window below": {"scoring": (1.0, 0.0, -1)},
        **sizes_of(
            SIZES["attend"],
            {0: (-1, 3), **dict.fromkeys(range(1, 7), (0, *ANY)), 7: ANY, 8: ANY},
        ),
    },
    "store": {
        "too few rows": {"rows": bytes(22)},
        "a cache too small": {"cache": bytearray(510)},
        "a cache too large": {"cache": bytearray(514)},
        "a slot too large": {"slots": numbers(32, 0)},
        "a slot below": {"slots": numbers(-1, 0)},
        "no slots": {"slots": numbers()},
        "sizes of another type": {"sizes": list(SIZES["store"])},
        **sizes_of(
            SIZES["store"],
            {0: (-1, 3), 1: (-1, 3), **dict.fromkeys((2, 3, 4), (0, *ANY)), 5: ANY, 6: ANY},
        ),
    },
    "attention_inputs": {
        "half a row": {"rows": bytes(4 * (H + 1))},
        "a token without room": {"out": bytearray(4 * 6 * OUTPUTS)},
        "a token without angles": {"angles": bytes(4 * 6 * D)},
        "a norm of another size": {"norm": bytes(4 * (H - 1))},
        "weights of another size": {"packed": bytes(4)},
        "head norms of another size": {"head_norms": bytes(4 * D)},
        "an odd head": {"sizes": (H, Q, G, 5, 0, 0, 1, 1, 5, 5)},
        "head norms that divide nothing": {"sizes": (H, Q, G, D, 0, 0, 1, 1, 5, 7)},
        **sizes_of(SIZES["attention_inputs"], {1: (0,), 5: (4,), 6: (0,), 7: (3,)}),
    },
    "attention_outputs": {
        "half a row": {"attended": bytes(4 * 25)},
        "a residual too many": {"residual": bytes(4 * H * 3)},
        "too little room": {"sums": bytearray(4 * H)},
        "too little room for the norm": {"normed": bytearray(4 * H)},
        "weights of another size": {"packed": bytes(8)},
        "a norm of another size": {"norm": bytes(4)},
        **sizes_of(SIZES["attention_outputs"], {5: (0,)}),
    },
    "choose": {
        "half a row": {"rows": bytes(70)},
        "a token too many": {"rows": bytes(96)},
        "too little room for ids": {"ids": bytearray(24)},
        "too little room for weights": {"weights": bytearray(12)},
        "a correction of another length": {"correction": bytes(12)},
        "a mask of another length": {"allowed": bytes(7)},
        "weights of another size": {"packed": bytes(8 * 32 * 4 - 4)},
        "more best groups than groups": {"sizes": (*SIZES["choose"][:12], 3, 1)},
        "more of a group than it has": {"sizes": (*SIZES["choose"][:13], 3)},
        **sizes_of(SIZES["choose"], {2: (0, 5), 7: (3,), 11: (3,)}),
        "no thread": {"threads": 0},
        "a forced id too few": {"forced": bytes(24)},
        "a forced id beyond the experts": {"forced": numbers(0, 1, 4, 0)},
        "a negative id beside a forced one": {"forced": numbers(0, -1, 0, 1)},
    },
    "normalise": {
        "half a row": {"rows": bytes(36)},
        "too little room": {"out": bytearray(32)},
        "weights of another length": {"weights": bytes(28)},
        **sizes_of(SIZES["normalise"], {0: (0,), 1: (3,), 3: (0,)}),
    },
    "linear": {
        "half a row": {"rows": bytes(4 * 8 * 3 + 4)},
        "fewer rows than room": {"rows": bytes(4 * 8 * 2)},
        "too little room": {"out": bytearray(4 * 5 * 3 - 4)},
        "weights of another size": {"packed": bytes(8 * 32 * 4 + 4)},
        **sizes_of(
            SIZES["linear"], {0: (0, 5), 1: (0, 1 << 60), 3: (3,), 4: (9,), 5: (-1,), 6: (1,)}
        ),
        "no thread": {"threads": 0},
        "an unknown kernel": {"kernel": "sse"},
    },
    "attention_half": {
        "no token": {"slots": numbers()},
        "a row too few": {"residual": bytearray(4 * H * 2), "last output": None},
        "a row of the output too few": {"last output": bytes(4 * H * 2)},
        "a value of the output too many": {"last output": bytes(4 * H * TOKENS + 4)},
        "a residual stream that nobody can write": {"residual": bytes(4 * H * TOKENS)},
        "no output, and a stream that nobody can write": {
            "residual": bytes(4 * H * TOKENS), "last output": None
        },
        "sums of an unknown format": part("heads", (7, 4, PAGES, G, Q, D)),
        "a slot too few": {"slots": numbers(1, 2)},
        "a slot beyond the cache": {"slots": numbers(1, 2, 16 * PAGES)},
        "a page beyond the cache": {"pages": numbers(PAGES)},
        "a span of other tokens": {"spans": np.array([[0, 2, 1, 0]])},
        "angles too few": {"angles": bytes(4 * D * 2)},
        "room for two rows": {"out": bytearray(4 * H * 2)},
        "too much room": {"out": bytearray(4 * H * TOKENS + 1)},
        "no head": part("heads", (0, 4, PAGES, 0, Q, D)),
        "heads without end": part("heads", (0, 4, PAGES, 1 << 16, 1 << 16, 1 << 16)),
        "more heads than are projected": part("heads", (0, 4, PAGES, 2 * G, 2 * Q, D)),
        "values of another size": part("heads", (0, 2, PAGES, G, Q, D)),
        "another cache": part("keys", bytearray(8)),
        "values that nobody can write": part("values", bytes(4 * PAGES * 16 * G * D)),
        "weights of another size": part("output", bytes(4)),
        "no parts": {"parts": ()},
        "parts that are none": {"parts": [None] * len(PARTS)},
    },
}  # fmt: skip
CASES = [(function, case) for function, cases in WRONG.items() for case in cases]


def called(function: str, arguments: Arguments) -> None:
    fresh = [bytearray(v) if isinstance(v, bytearray) else v for v in arguments.values()]
    getattr(native, function)(*fresh)


@pytest.mark.parametrize(("function", "case"), CASES)
def test_what_does_not_fit_is_refused(function: str, case: str) -> None:
    called(function, RIGHT[function])
    errors: Any = TypeError if "type" in case else ValueError
    if function == "attention_half":
        errors = ValueError, TypeError, BufferError
    with pytest.raises(errors, match=r"."):
        called(function, {**RIGHT[function], **WRONG[function][case]})


@pytest.mark.parametrize("function", RIGHT)
def test_buffers_are_let_go(function: str) -> None:
    arguments = [bytearray(v) if isinstance(v, bytes) else v for v in RIGHT[function].values()]
    arrays = [v for v in arguments if isinstance(v, np.ndarray)]
    counts = [sys.getrefcount(array) for array in arrays]
    for _ in range(100):
        getattr(native, function)(*arguments)
    for case in WRONG[function].values():
        with suppress(ValueError, TypeError, BufferError):
            getattr(native, function)(*{**RIGHT[function], **case}.values())
    assert [sys.getrefcount(array) for array in arrays] == counts
    for buffer in (v for v in arguments if isinstance(v, bytearray)):
        buffer.append(1)  # no view of it is held any more


@pytest.mark.parametrize("room", [b"12345678", np.arange(8)[::2]], ids=["bytes", "strided"])
def test_what_cannot_be_written_is_refused(room: object) -> None:
    with pytest.raises((TypeError, ValueError, BufferError)):
        called("combine", {**RIGHT["combine"], "room": room})
    with pytest.raises(OverflowError):
        called("gather", {**RIGHT["gather"], "k": 2**70})
