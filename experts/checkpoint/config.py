"""A model's configuration: reading the file, finding the family, and checking the values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, shown
from experts.checkpoint.config_checks import (
    MAX_SIZE,
    check_depth,
    check_numbers,
    check_rotary,
    check_size,
)
from experts.checkpoint.quantization import quantization_of
from experts.families.base import ACTIVATION_NAMES, Config, ExpertShape, Family
from experts.families.registry import FAMILIES

MAX_SMALL_BYTES = 64 << 20
"""The most bytes of a file beside the weights; a tokenizer is the longest of these."""
MAX_JSON_BYTES = 16 << 20
"""The most bytes of a JSON file; parsed JSON can take twenty times its length in memory."""
_MAX_LAYERS = 10_000
_SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""The rotary embeddings whose angles depend only on the position."""


def read_small(file: Path, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """Read a file beside the weights; raises :class:`CheckpointError` naming it."""
    try:
        if file.exists() and not file.is_file():  # reading a pipe could block for ever
            raise CheckpointError("is not a file", str(file))
        if file.stat().st_size > max_bytes:
            raise CheckpointError(f"is larger than {max_bytes} bytes", str(file))
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(file)) from None


def read_json(file: Path) -> dict[str, Any]:
    """Read one of a checkpoint's JSON files; raises :class:`CheckpointError` naming it."""
    return parse_json(read_small(file, MAX_JSON_BYTES), file)


def parse_json(data: bytes, file: Path) -> dict[str, Any]:
    """Parse a file's ``data`` as a JSON object; raises :class:`CheckpointError`."""
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"is larger than {MAX_JSON_BYTES} bytes", str(file))
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", str(file)) from None
    if not isinstance(value, dict):
        raise CheckpointError("must hold a JSON object", str(file))
    check_depth(value, file)
    return value


def family_of(config: Config, file: Path) -> Family:
    """Return the family of a configuration.

    Raises :class:`CheckpointError` for an unknown family or quantisation.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        given = config.get("model_type")
        raise CheckpointError(f"unknown model_type {shown(given)}; known: {known}", str(file))
    architectures = config.get("architectures") or list(family.architectures)
    if not isinstance(architectures, list) or not any(
        name in architectures for name in family.architectures
    ):
        known = ", ".join(family.architectures)
        given = architectures[0] if architectures and type(architectures) is list else architectures
        raise CheckpointError(f"unknown architectures: {shown(given)}; known: {known}", str(file))
    quantization_of(config, file)
    return family


def usual_config(family: Family, config: Config, file: Path) -> Config:
    """Return a configuration with the usual key names of all families.

    Raises :class:`CheckpointError` for wrong values and for options that are not served.
    """
    with wrong_kinds(file):
        config = family.usual(config)
    check_rotary(config, file)
    with wrong_kinds(file):
        types = {str(rope.get("rope_type", rope.get("type", "default"))) for rope in _ropes(config)}
    unknown = types - set(ROPE_TYPES)
    if unknown:
        raise CheckpointError(
            f"rope type {shown(min(unknown))} is not supported: its angles depend on the "
            f"longest request of a step; supported: {', '.join(ROPE_TYPES)}",
            str(file),
        )
    shares = [part.get("partial_rotary_factor") for part in (config, *_ropes(config))]
    if types != {"default"} and any(share not in (None, 1) for share in shares):
        raise CheckpointError(
            "partial_rotary_factor is not supported: heads are rotated as a whole", str(file)
        )
    for key, served in family.options.items():
        value = config.get(key)
        if value is not None and value not in served:
            allowed = " or ".join(map(json.dumps, served))
            raise CheckpointError(
                f"{key} {shown(value)} is not supported for {family.model_type}; must be {allowed}",
                str(file),
            )
    return config


def _ropes(config: Config) -> Iterator[Config]:
    """Yield a configuration's rotary embeddings, of all layers or of each kind of layer."""
    for rope in (config.get("rope_parameters") or {}, config.get("rope_scaling") or {}):
        yield rope
        yield from (value for value in rope.values() if isinstance(value, dict))


@contextmanager
def wrong_kinds(file: Path) -> Iterator[None]:
    """Turn the errors of code that trusts a configuration's types into :class:`CheckpointError`."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"lacks the key {error.args[0]}", str(file)) from None
    except ValueError as error:
        raise CheckpointError(_line(error), str(file)) from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"has a value of the wrong type: {_line(error)}", str(file)) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def checked_shape(family: Family, config: Config, file: Path) -> ExpertShape:
    """Check the sizes in a configuration, and return those of the experts.

    ``config`` is a result of :func:`usual_config`. Raises :class:`CheckpointError`.
    """
    for key in (*_SIZES, *(key for key in _OPTIONAL_SIZES if config.get(key) is not None)):
        check_size(config, key, file)
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise CheckpointError(f"num_hidden_layers must be at most {_MAX_LAYERS}", str(file))
    with wrong_kinds(file):
        shape = family.expert_shape(config)
    numbers = (shape.num_experts, shape.num_experts_per_tok, shape.intermediate_size)
    if any(type(n) is not int or not 1 <= n <= MAX_SIZE for n in numbers) or not shape.layers:
        raise CheckpointError(
            f"must have positive numbers of experts, layers and sizes, at most {MAX_SIZE}",
            str(file),
        )
    if shape.activation not in ACTIVATION_NAMES:
        known, given = ", ".join(ACTIVATION_NAMES), shown(shape.activation)
        raise CheckpointError(f"unknown hidden_act {given}; known: {known}", str(file))
    if shape.num_experts_per_tok > shape.num_experts:
        raise CheckpointError("num_experts_per_tok is larger than the number of experts", str(file))
    check_numbers(config, file)
    return shape
