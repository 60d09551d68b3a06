"""Writing one safetensors file, a tensor at a time.

The library's own writer takes all tensors of a file at once. The format is that of
github.com/huggingface/safetensors: the length of the header, the header as JSON, then the tensors
without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.wire.frames import DTYPE_BYTES
from experts.checkpoint.shards import DTYPES
from workshop.convert.plan import Shard

if TYPE_CHECKING:
    import torch

_CODES = {name: code for code, name in DTYPES.items()}
_ALIGNMENT = 8


def write_shard(file: Path, shard: Shard, tensors: Iterable[torch.Tensor]) -> None:
    """Write a shard whose tensors come in the order of its pieces, in the pieces' dtypes.

    Wider numbers lie before narrower ones, so that every tensor is aligned. Raises ``OSError``.
    """
    from cluster.wire.tensors import to_bytes

    places = _places(shard)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for piece in shard.pieces:
        begin = places[piece.name]
        header[piece.name] = {
            "dtype": _CODES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [begin, begin + piece.num_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        data_begin = opened.tell()
        for piece, tensor in zip(shard.pieces, tensors, strict=True):
            opened.seek(data_begin + places[piece.name])
            opened.write(to_bytes(tensor))


def _places(shard: Shard) -> dict[str, int]:
    """Return where each tensor of a shard begins."""
    places, begin = {}, 0
    for piece in sorted(shard.pieces, key=lambda piece: -DTYPE_BYTES[piece.dtype]):
        places[piece.name] = begin
        begin += piece.num_bytes
    return places
