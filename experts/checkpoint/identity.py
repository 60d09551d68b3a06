"""The identity of a checkpoint: a hash that differs from other checkpoints under its path."""

from __future__ import annotations

import hashlib
import json

from experts.checkpoint.checkpoint import Checkpoint, read_range

SAMPLED_TENSORS = 2048
SAMPLE_BYTES = 4096


def identity_of(checkpoint: Checkpoint) -> str:
    """Return a hash of a checkpoint on any node: 32 hexadecimal digits.

    The hash covers the configuration, every tensor's name, shape and dtype, and a block from the
    middle of at most :data:`SAMPLED_TENSORS` tensors, which are evenly spaced by name. So further
    training changes the hash, and at most 8 MB are read. The distribution of tensors over files
    does not change it. Raises :class:`CheckpointError` when a file cannot be read.
    """
    if checkpoint.remote is not None:
        return checkpoint.remote.identity
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    names = sorted(checkpoint.tensors)
    for name in names:
        info = checkpoint.tensors[name]
        digest.update(json.dumps([name, info.shape, info.dtype]).encode())
    step = -(-len(names) // SAMPLED_TENSORS)
    for name in names[::step]:
        info = checkpoint.tensors[name]
        size = info.end - info.begin
        begin = max(0, size // 2 - SAMPLE_BYTES)
        digest.update(read_range(checkpoint, name, begin, min(size, begin + SAMPLE_BYTES)))
    return digest.hexdigest()[:32]
