"""Mutations of bytes and of JSON: near enough to what is good to get past a parser."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Literal

MAX_BYTES = 1 << 16
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_SIGNS = tuple((1 << bits) - one for bits in (31, 32, 63, 64) for one in (0, 1))
_EDGES = (0, 1, 2, 127, 128, 255, 256, 65_535, 65_536, *_SIGNS)
_PIECES = (
    b"\x00", b"\xff" * 8, b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 64, b"[" * 64, b"{}", b"null",
    b"NaN", b"-1", b"1e999", b"\xed\xa0\x80", b"../", b"\r\n\r\n", b"\x80\x04\x95", b"9" * 400,
)  # fmt: skip
_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "\x00", "\ud800", "../x", "x" * 5000, [],
    {}, [[]], [None], {"": None}, [0] * 300, {"a": {"b": {"c": []}}},
)  # fmt: skip


def mutated(source: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of ``seeds`` with some mutations; the same for the same ``source``."""
    seed = source.choice(seeds)
    as_json = _json_of(seed) if source.random() < 0.6 else None
    if as_json is not None:
        for _ in range(source.choice((1, 1, 2, 4))):
            as_json = odd(source, as_json)
        seed = json.dumps(as_json).encode()
        if source.random() < 0.7:
            return seed[:MAX_BYTES]
    data = bytearray(seed)
    for _ in range(source.choice((1, 1, 1, 2, 3, 8))):
        _change(source, data, seeds)
    return bytes(data[:MAX_BYTES])


def odd(source: random.Random, value: Any) -> Any:
    """Return a JSON value with one place in it changed to something odd, or left out."""
    if isinstance(value, dict) and value and source.random() < 0.85:
        key = source.choice(sorted(value))
        changed = dict(value)
        fate = source.random()
        if fate < 0.1:
            del changed[key]
        elif fate < 0.2:
            changed[f"{key}{source.choice(('x', '_', ' '))}"] = changed[key]
        else:
            changed[key] = odd(source, value[key])
        return changed
    if isinstance(value, list) and value and source.random() < 0.85:
        place = source.randrange(len(value))
        return [*value[:place], odd(source, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and source.random() < 0.3:
        return value + source.choice((-1, 1, 1000, -(2**40)))
    return source.choice(_ODD_VALUES)


def _json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _change(source: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    place = source.randrange(len(data) + 1)
    length = min(source.choice((1, 2, 4, 8, 16, 64)), len(data) - place)
    kind = source.randrange(8)
    if kind == 0 and length:
        data[place] ^= 1 << source.randrange(8)
    elif kind == 1 and length:
        data[place] = source.randrange(256)
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        data[place:place] = source.randbytes(length or 1)
    elif kind == 4:
        data[place:place] = source.choice(_PIECES)
    elif kind == 5:
        data[place : place + length] = data[place : place + length] * source.choice((2, 3, 50))
    elif kind == 6:
        size = source.choice((1, 2, 4, 8))
        number = source.choice(_EDGES) % (1 << (8 * size))
        data[place : place + size] = number.to_bytes(size, source.choice(_ORDERS))
    else:
        other = source.choice(seeds)
        data[place:] = other[source.randrange(len(other) + 1) :]
