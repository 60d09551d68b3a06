"""Quantised checkpoints: which of their tensors are codes, and where the scales of these lie.

Two methods are known. ``fp8`` (DeepSeek-V3's and Qwen3's): a matrix [N, K] of eight-bit numbers and
beside it, as ``…_scale_inv``, a factor for each block of it. ``mxfp4`` (GPT-OSS's; Open Compute
Project 2023, "Microscaling Formats"): of a stack [E, N, K] the ``…_blocks`` [E, K, N/32, 16], two
numbers to a byte, and the ``…_scales`` [E, K, N/32], exponents of two. The headers tell which
tensors are quantised; all others are as they are, whatever the configuration's list of them says.
:mod:`experts.checkpoint.dequantize` computes the values; here all is without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, shown, shown_name
from experts.checkpoint.config_checks import MAX_SIZE
from experts.checkpoint.shards import TensorInfo
from experts.families.base import Config, Shapes

FP8, MXFP4 = "fp8", "mxfp4"
METHODS = (FP8, MXFP4)
MXFP4_BLOCK = 32
"""Numbers that share an exponent; two of them are in a byte."""
_FP8_CODES = "F8_E4M3"
_FP8_OPTIONS = {"fmt": ("e4m3",), "activation_scheme": ("dynamic",)}
_SCALES = {FP8: ("F32", "BF16"), MXFP4: ("U8",)}
_CODES = {FP8: (_FP8_CODES,), MXFP4: ("U8",)}


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a configuration says of it: the method, and of ``fp8`` a block's (rows, columns)."""

    method: str
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Packed:
    """Where the values of a quantised tensor of ``shape`` lie: tensors of codes and of scales."""

    method: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    codes: str
    scales: str

    def stored(self) -> Shapes:
        """Return the shapes of both."""
        if self.method == FP8:
            (rows, columns), (height, width) = self.shape, self.block
            scales = (-(-rows // height), -(-columns // width))
            return {self.codes: (rows, columns), self.scales: scales}
        experts, rows, columns = self.shape
        blocks = (experts, columns, rows // MXFP4_BLOCK)
        return {self.codes: (*blocks, MXFP4_BLOCK // 2), self.scales: blocks}


def quantization_of(config: Config, file: Path) -> Quantization | None:
    """Return what a configuration says of quantisation, or ``None`` where it is not quantised.

    Raises :class:`CheckpointError` naming ``file`` and the key for a method that is not known and
    for options of one that are not served.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise _wrong("quantization_config", given, "a mapping", file)
    method = given.get("quant_method")
    if method not in METHODS:
        raise _wrong("quantization_config.quant_method", method, " or ".join(METHODS), file)
    if method == MXFP4:
        return Quantization(MXFP4, (1, MXFP4_BLOCK))
    for key, served in _FP8_OPTIONS.items():
        if given.get(key, served[0]) not in served:
            raise _wrong(f"quantization_config.{key}", given[key], " or ".join(served), file)
    block = given.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_size, block)):
        key = "quantization_config.weight_block_size"
        raise _wrong(key, block, "two positive integers, rows and columns", file)
    return Quantization(FP8, (block[0], block[1]))


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE


def packed_tensors(
    quantization: Quantization | None,
    expected: Shapes,
    tensors: Mapping[str, TensorInfo],
    folder: Path,
) -> dict[str, Packed]:
    """Return which of the model's tensors, of the shapes ``expected``, are quantised, and how.

    Raises :class:`CheckpointError` naming the file for codes of a tensor of which there are none.
    """
    packed = {}
    if quantization is not None:
        for name, shape in expected.items():
            one = _packed(quantization, name, shape, tensors)
            if one is not None:
                _check_dimensions(one, folder / tensors[one.codes].file)
                packed[name] = one
    return packed


def _packed(
    quantization: Quantization,
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, TensorInfo],
) -> Packed | None:
    method, block = quantization.method, quantization.block
    if method == MXFP4:
        names = f"{name}_blocks", f"{name}_scales"
        return Packed(method, shape, block, *names) if names[0] in tensors else None
    info = tensors.get(name)
    if info is None or info.dtype != _FP8_CODES:
        return None
    return Packed(method, shape, block, name, f"{name}_scale_inv")


def _check_dimensions(packed: Packed, file: Path) -> None:
    shape = packed.shape
    if packed.method == FP8 and len(shape) != 2:
        raise CheckpointError(f"tensor {packed.codes} is quantised, but is no matrix", str(file))
    if packed.method == MXFP4 and (len(shape) != 3 or shape[1] % MXFP4_BLOCK):
        raise CheckpointError(
            f"tensor {packed.codes} is for a tensor {list(shape)}, which has no blocks of "
            f"{MXFP4_BLOCK} in its second dimension of three",
            str(file),
        )


def check_dtypes(packed: Packed, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raise :class:`CheckpointError` unless codes and scales are of the method's dtypes."""
    for name, allowed in (
        (packed.codes, _CODES[packed.method]),
        (packed.scales, _SCALES[packed.method]),
    ):
        info = tensors[name]
        if info.dtype not in allowed:
            raise CheckpointError(
                f"tensor {shown_name(name)} has dtype {info.dtype}; of {packed.method} it must be "
                f"{' or '.join(allowed)}",
                str(folder / info.file),
            )


def _wrong(key: str, value: Any, allowed: str, file: Path) -> CheckpointError:
    return CheckpointError(f"{key} must be {allowed} (given: {shown(value)})", str(file))
