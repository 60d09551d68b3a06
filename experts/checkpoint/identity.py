"""What tells one checkpoint from another under the same path: a hash of what it is made of."""

from __future__ import annotations

import hashlib
import json

from experts.checkpoint.checkpoint import Checkpoint, read_range

SAMPLED_TENSORS = 2048
SAMPLE_BYTES = 4096


def identity_of(checkpoint: Checkpoint) -> str:
    """Return a hash of a checkpoint, wherever its files are: 32 hexadecimal digits.

    It covers the configuration, every tensor's name, shape and dtype, and a block from the middle
    of each tensor; of a checkpoint with more than :data:`SAMPLED_TENSORS`, of as many that are
    evenly apart by name. So a model that was trained on is another one, and no more than 8 MB are
    read. How the tensors are spread over files does not count. Raises :class:`CheckpointError` when
    a file cannot be read.
    """
    if checkpoint.remote is not None:
        return checkpoint.remote.identity
    told = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    names = sorted(checkpoint.tensors)
    for name in names:
        info = checkpoint.tensors[name]
        told.update(json.dumps([name, info.shape, info.dtype]).encode())
    apart = -(-len(names) // SAMPLED_TENSORS)
    for name in names[::apart]:
        info = checkpoint.tensors[name]
        size = info.end - info.begin
        begin = max(0, size // 2 - SAMPLE_BYTES)
        told.update(read_range(checkpoint, name, begin, min(size, begin + SAMPLE_BYTES)))
    return told.hexdigest()[:32]
