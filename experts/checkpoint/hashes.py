"""The tree of hashes over a checkpoint: leaves, tensors, root.

Every hash is BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020) of 32 bytes. The tree has
three levels (Merkle 1987):

- A **leaf** is the hash of :data:`LEAF_BYTES` of a tensor's stored bytes, counted from the tensor's
  first byte. The last leaf of a tensor has the rest.
- The hash of a **tensor** covers the line ``[name, shape, dtype]`` and the tensor's leaves.
- The **root** covers the line of the configuration and the hashes of all tensors in the order of
  their names. An identity is the root's first 32 hexadecimal digits.

A line is JSON without spaces, with sorted keys and escaped characters beyond ASCII, and a line
feed. JSON has no line feed of its own, so different contents never give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from experts.checkpoint.shards import TensorInfo
from experts.families.base import Config

LEAF_BYTES = 256 << 10
"""The bytes under one leaf. All leaves take 1/8192 of the checkpoint. An expert's slice of a fused
tensor is verified with at most two leaves more than its own bytes."""
HASH_BYTES = 32
IDENTITY_DIGITS = 32


@dataclass(frozen=True, slots=True)
class HashTable:
    """The leaves of every tensor by name, one after another, and the identity over them."""

    identity: str
    leaves: Mapping[str, bytes]

    @classmethod
    def of(
        cls, config: Config, tensors: Mapping[str, TensorInfo], leaves: Mapping[str, bytes]
    ) -> HashTable:
        """Compute the tensors' hashes and the root; ``leaves`` has an entry for each tensor."""
        hashes = {name: tensor_hash(name, info, leaves[name]) for name, info in tensors.items()}
        return cls(root_of(config, hashes), {name: leaves[name] for name in tensors})

    def has_leaf(self, name: str, number: int, data: memoryview) -> bool:
        """Return whether ``data`` are the bytes under a tensor's leaf."""
        begin = number * HASH_BYTES
        return leaf_hashes(data) == self.leaves[name][begin : begin + HASH_BYTES]


def num_leaves(num_bytes: int) -> int:
    """Return the number of leaves of a tensor of ``num_bytes``."""
    return -(-num_bytes // LEAF_BYTES)


def leaf_hashes(data: memoryview) -> bytes:
    """Return the leaves of bytes that begin at a leaf."""
    if len(data) <= LEAF_BYTES:
        return blake3(data).digest() if len(data) else b""
    return b"".join(
        blake3(data[begin : begin + LEAF_BYTES]).digest()
        for begin in range(0, len(data), LEAF_BYTES)
    )


def leaf_spans(begin: int, end: int, num_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, begin and end of the leaves over bytes ``begin`` to ``end`` of a tensor."""
    for number in range(begin // LEAF_BYTES, num_leaves(end)):
        yield number, number * LEAF_BYTES, min(num_bytes, (number + 1) * LEAF_BYTES)


def widened(begin: int, end: int, num_bytes: int) -> tuple[int, int]:
    """Return the bytes of whole leaves over bytes ``begin`` to ``end`` of a tensor."""
    return begin // LEAF_BYTES * LEAF_BYTES, min(num_bytes, num_leaves(end) * LEAF_BYTES)


def tensor_hash(name: str, info: TensorInfo, leaves: bytes) -> bytes:
    """Return the hash of a tensor with these leaves."""
    return blake3(_line([name, info.shape, info.dtype])).update(leaves).digest()


def root_of(config: Config, hashes: Mapping[str, bytes]) -> str:
    """Return the identity of a checkpoint whose tensors have these hashes."""
    root = blake3(_line(config))
    for name in sorted(hashes):
        root.update(hashes[name])
    return root.hexdigest()[:IDENTITY_DIGITS]


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
