"""K-quantised tensors of GGUF against the formulas of their blocks, a value at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from workshop.convert.gguf_file import GgufFile

BLOCK = 256
"""The values of a block."""


def float16_of(raw: np.ndarray) -> float:
    return float(raw.view(np.float16)[0])


def q4_k_scale(scales: np.ndarray, group: int) -> tuple[int, int]:
    """Return the scale and the minimum of a group of 32, six bits each."""
    low = [int(value) for value in scales]
    if group < 4:
        return low[group] & 63, low[group + 4] & 63
    return (
        (low[group + 4] & 15) | (low[group - 4] >> 6) << 4,
        low[group + 4] >> 4 | (low[group] >> 6) << 4,
    )


def q4_k_values(raw: np.ndarray) -> list[float]:
    d, least, scales, codes = float16_of(raw[:2]), float16_of(raw[2:4]), raw[4:16], raw[16:]
    values = []
    for index in range(BLOCK):
        group, place = divmod(index, 32)
        byte = int(codes[group // 2 * 32 + place])
        scale, minimum = q4_k_scale(scales, group)
        values.append(d * scale * (byte >> 4 if group % 2 else byte & 15) - least * minimum)
    return values


def q6_k_values(raw: np.ndarray) -> list[float]:
    low, high, scales = raw[:128], raw[128:192], raw[192:208].view(np.int8)
    d, values = float16_of(raw[208:210]), []
    for index in range(BLOCK):
        half, within = divmod(index, 128)
        quarter, place = divmod(within, 32)
        byte = int(low[half * 64 + quarter % 2 * 32 + place])
        four = byte >> 4 if quarter >= 2 else byte & 15
        two = int(high[half * 32 + place]) >> (2 * quarter) & 3
        scale = int(scales[half * 8 + quarter * 2 + place // 16])
        values.append(d * scale * ((four | two << 4) - 32))
    return values


@pytest.mark.parametrize(
    ("kind", "num_bytes", "places_of_factors", "values_of"),
    [
        (gguf.GGMLQuantizationType.Q4_K, 144, (0, 2), q4_k_values),
        (gguf.GGMLQuantizationType.Q6_K, 210, (208,), q6_k_values),
    ],
)
def test_rows_of_blocks_are_read_by_their_formula(
    kind: gguf.GGMLQuantizationType,
    num_bytes: int,
    places_of_factors: tuple[int, ...],
    values_of: Callable[[np.ndarray], list[float]],
    tmp_path: Path,
) -> None:
    source = np.random.default_rng(0)
    blocks = source.integers(0, 256, (3, 2, num_bytes), dtype=np.uint8)  # three rows of two blocks
    for place in places_of_factors:
        factors = source.normal(size=(3, 2, 1)).astype(np.float16)
        blocks[..., place : place + 2] = factors.view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks.reshape(3, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "file.gguf")
    assert file.entries["blk.0.ffn_up.weight"].shape == (3, 2 * BLOCK)
    for begin, end in ((0, 3), (1, 2)):
        found = file.read("blk.0.ffn_up.weight", begin, end)
        expected = [
            [value for block in row for value in values_of(block)] for row in blocks[begin:end]
        ]
        np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=1e-6, atol=1e-6)
