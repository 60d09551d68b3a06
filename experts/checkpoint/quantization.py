"""The quantised tensors of a checkpoint: their codes and their scales.

Two methods are known:

- ``fp8`` (DeepSeek-V3, Qwen3): a matrix [N, K] of eight-bit numbers, and in ``…_scale_inv`` a
  factor for each block of the matrix.
- ``mxfp4`` (GPT-OSS; Open Compute Project 2023, "Microscaling Formats"): for a stack [E, N, K] the
  codes ``…_blocks`` [E, K, N/32, 16], two numbers in a byte, and the scales ``…_scales``
  [E, K, N/32], exponents of two.

The headers show which tensors are quantised; the configuration's own list does not count.
:mod:`experts.checkpoint.dequantize` computes the values. This module does not need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CheckpointError, shown_name
from experts.checkpoint.config_checks import is_size, wrong_value
from experts.checkpoint.shards import TensorInfo
from experts.families.base import Config, Shapes

FP8, MXFP4 = "fp8", "mxfp4"
METHODS = (FP8, MXFP4)
MXFP4_BLOCK = 32
"""Numbers that share an exponent; a byte has two numbers."""
_FP8_CODES = "F8_E4M3"
_FP8_OPTIONS = {"fmt": ("e4m3",), "activation_scheme": ("dynamic",)}
_SCALES = {FP8: ("F32", "BF16"), MXFP4: ("U8",)}
_CODES = {FP8: (_FP8_CODES,), MXFP4: ("U8",)}


@dataclass(frozen=True, slots=True)
class Quantization:
    """A configuration's quantisation: the method, and the (rows, columns) of an ``fp8`` block."""

    method: str
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised tensor of ``shape``; ``codes`` and ``scales`` are names of stored tensors."""

    method: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    codes: str
    scales: str

    def stored(self) -> Shapes:
        """Return the shapes of the stored tensors by name."""
        if self.method == FP8:
            (rows, columns), (height, width) = self.shape, self.block
            scales = (-(-rows // height), -(-columns // width))
            return {self.codes: (rows, columns), self.scales: scales}
        experts, rows, columns = self.shape
        blocks = (experts, columns, rows // MXFP4_BLOCK)
        return {self.codes: (*blocks, MXFP4_BLOCK // 2), self.scales: blocks}


def quantization_of(config: Config, file: Path) -> Quantization | None:
    """Return a configuration's quantisation, or ``None`` without one.

    Raises :class:`CheckpointError` with the file and the key for an unknown method and for options
    that are not served.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise wrong_value("quantization_config", given, "a mapping", file)
    method = given.get("quant_method")
    if method not in METHODS:
        raise wrong_value("quantization_config.quant_method", method, " or ".join(METHODS), file)
    if method == MXFP4:
        return Quantization(MXFP4, (1, MXFP4_BLOCK))
    for key, served in _FP8_OPTIONS.items():
        if given.get(key, served[0]) not in served:
            raise wrong_value(f"quantization_config.{key}", given[key], " or ".join(served), file)
    block = given.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
        key = "quantization_config.weight_block_size"
        raise wrong_value(key, block, "two positive integers, rows and columns", file)
    return Quantization(FP8, (block[0], block[1]))


def packed_tensors(
    quantization: Quantization | None,
    expected: Shapes,
    tensors: Mapping[str, TensorInfo],
    folder: Path,
) -> dict[str, Packed]:
    """Return the quantised tensors by name, among those that a model has (``expected``).

    Raises :class:`CheckpointError` with the file for codes of a tensor whose shape has no blocks.
    """
    packed = {}
    if quantization is not None:
        for name, shape in expected.items():
            tensor = _packed(quantization, name, shape, tensors)
            if tensor is not None:
                _check_dimensions(tensor, folder / tensors[tensor.codes].file)
                packed[name] = tensor
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
        raise CheckpointError(f"tensor {packed.codes} is quantised but not a matrix", str(file))
    if packed.method == MXFP4 and (len(shape) != 3 or shape[1] % MXFP4_BLOCK):
        raise CheckpointError(
            f"tensor {packed.codes} is for a tensor {list(shape)}, which has no blocks of "
            f"{MXFP4_BLOCK} in its second dimension of three",
            str(file),
        )


def check_dtypes(packed: Packed, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raise :class:`CheckpointError` unless codes and scales have the method's dtypes."""
    for name, allowed in (
        (packed.codes, _CODES[packed.method]),
        (packed.scales, _SCALES[packed.method]),
    ):
        info = tensors[name]
        if info.dtype not in allowed:
            raise CheckpointError(
                f"tensor {shown_name(name)} has dtype {info.dtype}; for {packed.method} it must be "
                f"{' or '.join(allowed)}",
                str(folder / info.file),
            )
