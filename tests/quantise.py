"""Checkpoints quantised as their makers do, and what their codes stand for, a number at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from experts.checkpoint.checkpoint import open_checkpoint
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS

WEIGHTS = "model.safetensors"
State = dict[str, torch.Tensor]
FP8_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [32, 24],
}
"""A ``quantization_config``; few sizes of the tests' checkpoints are multiples of its blocks."""
MXFP4_CONFIG: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}
NOT_CONVERTED = ("gate.", "lm_head", "embed_tokens", "norm", "bias", "layers.0.self_attn")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(byte: int) -> float:
    """Return the number of a sign, four bits of exponent and three of fraction."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, fraction = byte >> 3 & 15, byte & 7
    if (exponent, fraction) == (15, 7):
        return math.nan
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def blocks_of(shape: torch.Size, block: tuple[int, int]) -> list[tuple[int, int, slice, slice]]:
    """Return number, rows and columns of each block of a matrix; the last ones may be smaller."""
    (rows, columns), (height, width) = shape, block
    return [
        (i, j, slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
        for i in range(-(-rows // height))
        for j in range(-(-columns // width))
    ]


def fp8(weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> State:
    """Return the codes and the scales of a matrix."""
    places = blocks_of(weight.shape, block)
    scales = torch.empty(places[-1][0] + 1, places[-1][1] + 1, dtype=scale_dtype)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i, j, rows, columns in places:
        part = weight[rows, columns].float()
        scales[i, j] = part.abs().max() / 448
        codes[rows, columns] = (part / scales[i, j].float()).to(torch.float8_e4m3fn)
    return {"": codes, "_scale_inv": scales}


def fp8_values(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return what they stand for, in float32."""
    numbers = torch.tensor([e4m3(byte) for byte in range(256)])
    values = torch.empty(codes.shape)
    for i, j, rows, columns in blocks_of(codes.shape, block):
        bytes_ = codes[rows, columns].view(torch.uint8).long()
        values[rows, columns] = numbers[bytes_] * scales[i, j].float()
    return values


def mxfp4(stack: torch.Tensor) -> State:
    """Return the blocks and the scales of a stack [E, N, K]; N goes in blocks of 32."""
    groups = stack.float().transpose(1, 2).unflatten(2, (-1, 32))  # [E, K, N/32, 32]
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups / exponents.exp2().unsqueeze(-1)
    nearest = (scaled.abs().unsqueeze(-1) - torch.tensor(E2M1)).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"_blocks": blocks.contiguous(), "_scales": (exponents + 127).to(torch.uint8)}


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the stack that they stand for, in float32."""
    experts, columns, groups, _ = blocks.shape
    numbers = torch.tensor(E2M1 + [-number for number in E2M1])
    values = torch.empty(experts, groups * 32, columns)
    for group in range(groups):
        powers = 2.0 ** (scales[:, :, group].double() - 127)
        for byte in range(16):
            both = blocks[:, :, group, byte].long()
            for half, codes in enumerate((both % 16, both // 16)):
                values[:, group * 32 + 2 * byte + half] = (numbers[codes] * powers).float()
    return values


def quantise(
    source: Path,
    folder: Path,
    config: dict[str, Any],
    is_quantised: Callable[[str], bool],
    scale_dtype: torch.dtype = torch.float32,
) -> State:
    """Write ``folder`` as the quantised ``source``; returns the model's weights as they now are.

    ``config`` is the ``quantization_config``; ``is_quantised`` is asked for each tensor's name.
    """
    folder.mkdir()
    stored: State = {}
    values: State = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if not is_quantised(name):
            stored[name] = values[name] = tensor
        elif config["quant_method"] == "fp8":
            block = tuple(config["weight_block_size"])
            parts = fp8(tensor, block, scale_dtype)
            values[name] = fp8_values(parts[""], parts["_scale_inv"], block)
            stored |= {name + suffix: part for suffix, part in parts.items()}
        else:
            parts = mxfp4(tensor)
            values[name] = mxfp4_values(parts["_blocks"], parts["_scales"])
            stored |= {name + suffix: part for suffix, part in parts.items()}
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    write_config(source, folder, quantization_config=config)
    return values


def write_config(source: Path, folder: Path, **changes: Any) -> None:
    """Copy what lies beside the weights, with a changed ``config.json``."""
    for file in source.iterdir():
        if file.suffix == ".json" or file.suffix == ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def by_name(name: str) -> bool:
    """Tell what makers quantise, who leave out what is small or delicate."""
    return not any(part in name for part in NOT_CONVERTED)


def stacks(name: str) -> bool:
    """Tell DBRX's matrices of all experts."""
    return name.endswith(("w1", "v1", "w2"))


@dataclass(frozen=True)
class Case:
    """How a family's random checkpoint is quantised; few of its sizes are multiples of a block."""

    save: Callable[..., Any]
    config: dict[str, Any]
    is_quantised: Callable[[str], bool]
    scale_dtype: torch.dtype = torch.float32


CASES = {
    "deepseek_v3": Case(SAVERS["deepseek_v3"], FP8_CONFIG, by_name),
    "qwen3_moe": Case(
        SAVERS["qwen3_moe"],
        FP8_CONFIG | {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn"]},
        by_name,
        torch.bfloat16,
    ),
    "dbrx": Case(SAVERS["dbrx"], FP8_CONFIG | {"weight_block_size": [128, 128]}, stacks),
    "gpt_oss": Case(
        lambda folder, **sizes: SAVERS["gpt_oss"](folder, intermediate_size=64, **sizes),
        MXFP4_CONFIG,
        lambda name: name.endswith(("gate_up_proj", "down_proj")),
    ),
}
MIXTRAL = Case(save_mixtral, FP8_CONFIG, by_name)


@dataclass(frozen=True)
class Quantised:
    """A quantised checkpoint; ``plain`` has the same weights as they are, for transformers."""

    folder: Path
    plain: Path
    values: State
    oracle: Any


def make(case: Case, place: Path, **options: Any) -> Quantised:
    """Save a family's checkpoint, quantised, in a folder of ``place``."""
    case.save(place / "original", **options)
    values = quantise(
        place / "original", place / "fp", case.config, case.is_quantised, case.scale_dtype
    )
    (place / "plain").mkdir()
    plain = {name: tensor.float() for name, tensor in values.items()}
    save_file(plain, place / "plain" / WEIGHTS, {"format": "pt"})
    write_config(place / "original", place / "plain")
    oracle = _whole_model(place / "plain")
    return Quantised(place / "fp", place / "plain", values, oracle)


def _whole_model(folder: Path) -> Any:
    """Return transformers' own model, whole; its config is the one that we have mended."""
    checkpoint = open_checkpoint(folder)
    config = AutoConfig.for_model(**checkpoint.family.transformers_config(checkpoint.config))
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, **kinds
    ).eval()
