"""Checks of the values in a ``config.json`` at which transformers would fail later."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, shown
from experts.families.base import Config

MAX_DEPTH = 64
MAX_SIZE = 2**31 - 1
"""The largest size in a configuration; numbers of tokens travel as 32-bit integers."""
_ROTARY = ("rope_parameters", "rope_scaling")


def check_depth(value: Any, file: Path) -> None:
    """Raise :class:`CheckpointError` for JSON that is nested deeper than :data:`MAX_DEPTH`.

    The parser accepts JSON that is too deep for a later recursive walk.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise CheckpointError(f"is nested deeper than {MAX_DEPTH}", str(file))


def check_size(config: Config, key: str, file: Path) -> None:
    """Raise :class:`CheckpointError` unless a key is an integer from 1 to :data:`MAX_SIZE`."""
    if not is_size(config.get(key)):
        raise wrong_value(key, config.get(key), f"a positive integer up to {MAX_SIZE}", file)


def is_size(value: Any) -> bool:
    """Return whether a value is an integer from 1 to :data:`MAX_SIZE`."""
    return type(value) is int and 1 <= value <= MAX_SIZE


def check_numbers(config: Config, file: Path) -> None:
    """Check all values that are no sizes: numbers are finite, and heads fit.

    The sizes have been checked before. Raises :class:`CheckpointError` with the key and its allowed
    values.
    """
    _check_float(config, "rms_norm_eps", file)
    _check_float(config, "rope_theta", file)
    tied = config.get("tie_word_embeddings")
    if tied is not None and type(tied) is not bool:
        raise wrong_value("tie_word_embeddings", tied, "true or false", file)
    window = config.get("sliding_window")
    if window is not None and (type(window) is not int or not 0 <= window <= MAX_SIZE):
        raise wrong_value("sliding_window", window, f"null or an integer up to {MAX_SIZE}", file)
    _check_heads(config, file)


def _check_float(config: Config, key: str, file: Path) -> None:
    value = config.get(key)
    if value is not None and not (_is_finite(value) and value > 0):
        raise wrong_value(key, value, "a number above 0", file)


def check_rotary(config: Config, file: Path) -> None:
    """Check the rotary embeddings: mappings of finite numbers; raises :class:`CheckpointError`."""
    for key in _ROTARY:
        rotary = config.get(key)
        if rotary is not None and not isinstance(rotary, dict):
            raise wrong_value(key, rotary, "null or a mapping", file)
        for name, value in (rotary or {}).items():
            for number in value.values() if isinstance(value, dict) else [value]:
                if isinstance(number, (int, float)) and not _is_finite(number):
                    raise wrong_value(f"{key}.{name}", number, "a finite number", file)


def _check_heads(config: Config, file: Path) -> None:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise wrong_value("num_key_value_heads", kv_heads, f"a divisor of {heads} heads", file)
    size = config.get("head_dim") or config["hidden_size"] // heads
    if size < 2 or size % 2:  # rotary embeddings rotate pairs of values
        raise CheckpointError(
            f"head_dim, or hidden_size / num_attention_heads, must be even (given: {size})",
            str(file),
        )


def _is_finite(value: Any) -> bool:
    if isinstance(value, int):
        return -MAX_SIZE <= value <= MAX_SIZE
    return isinstance(value, float) and math.isfinite(value)


def wrong_value(key: str, value: Any, allowed: str, file: Path) -> CheckpointError:
    """Return the error of a key whose value is not allowed."""
    return CheckpointError(f"{key} must be {allowed} (given: {shown(value)})", str(file))
