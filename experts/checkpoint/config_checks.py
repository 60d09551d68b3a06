"""What is checked of a ``config.json``'s values: what transformers would trip over later."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, shown
from experts.families.base import Config

MAX_DEPTH = 64
MAX_SIZE = 2**31 - 1
"""Of any size in a configuration; counts of tokens travel as such integers."""
_ROTARY = ("rope_parameters", "rope_scaling")


def check_depth(value: Any, file: Path) -> None:
    """Raise :class:`CheckpointError` for JSON that is nested deeper than :data:`MAX_DEPTH`.

    What parses may still be too deep for whoever walks through it later.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise CheckpointError(f"is nested deeper than {MAX_DEPTH}", str(file))


def check_size(config: Config, key: str, file: Path) -> None:
    """Raise :class:`CheckpointError` unless a key is a positive integer that is no absurd one."""
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise CheckpointError(
            f"{key} must be a positive integer up to {MAX_SIZE} (given: {shown(value)})", str(file)
        )


def check_numbers(config: Config, file: Path) -> None:
    """Check what is no size: numbers must be finite, heads must fit.

    For a configuration whose sizes are positive integers. Raises :class:`CheckpointError` that
    names the key and says what it must be.
    """
    _check_float(config, "rms_norm_eps", file)
    _check_float(config, "rope_theta", file)
    tied = config.get("tie_word_embeddings")
    if tied is not None and type(tied) is not bool:
        raise _wrong("tie_word_embeddings", tied, "true or false", file)
    window = config.get("sliding_window")
    if window is not None and (type(window) is not int or not 0 <= window <= MAX_SIZE):
        raise _wrong("sliding_window", window, f"null or an integer up to {MAX_SIZE}", file)
    _check_heads(config, file)


def _check_float(config: Config, key: str, file: Path) -> None:
    value = config.get(key)
    if value is not None and not (_is_finite(value) and value > 0):
        raise _wrong(key, value, "a number above 0", file)


def check_rotary(config: Config, file: Path) -> None:
    """Check what says how positions turn: mappings, of finite numbers; raises as the others do."""
    for key in _ROTARY:
        rotary = config.get(key)
        if rotary is not None and not isinstance(rotary, dict):
            raise _wrong(key, rotary, "null or a mapping", file)
        for name, value in (rotary or {}).items():
            for number in value.values() if isinstance(value, dict) else [value]:
                if isinstance(number, (int, float)) and not _is_finite(number):
                    raise _wrong(f"{key}.{name}", number, "a finite number", file)


def _check_heads(config: Config, file: Path) -> None:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise _wrong("num_key_value_heads", kv_heads, f"a divisor of {heads} heads", file)
    size = config.get("head_dim") or config["hidden_size"] // heads
    if size < 2 or size % 2:  # rotary embeddings turn pairs
        raise CheckpointError(
            f"head_dim, or hidden_size / num_attention_heads, must be even (given: {size})",
            str(file),
        )


def _is_finite(value: Any) -> bool:
    if isinstance(value, int):
        return -MAX_SIZE <= value <= MAX_SIZE
    return isinstance(value, float) and math.isfinite(value)


def _wrong(key: str, value: Any, allowed: str, file: Path) -> CheckpointError:
    return CheckpointError(f"{key} must be {allowed} (given: {shown(value)})", str(file))
