"""The identity of a checkpoint: a hash over every byte of it (:mod:`experts.checkpoint.hashes`).

The identity covers the configuration and all tensors of the model, and not their distribution over
files. The files of the tokenizer have a hash of their own. The hashes of a checkpoint are computed
once and kept (:mod:`experts.checkpoint.hash_cache`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blake3 import blake3

from cluster.errors import CheckpointError
from experts.checkpoint.hash_cache import keep, place_of, read_kept
from experts.checkpoint.hashes import IDENTITY_DIGITS, HashTable
from experts.checkpoint.hashing import Watch, hash_tensors
from experts.checkpoint.hub import name_of
from experts.checkpoint.shards import listed_names
from experts.checkpoint.small_files import small_files_of, text_files_of
from experts.checkpoint.stored import Stored, read_range

LOGGED_BYTES = 1_000_000_000
"""Hashing this much takes seconds, so that it is logged."""
SAMPLED_LEAVES = 64

logger = logging.getLogger("expertmesh.hashes")


def identity_of(checkpoint: Stored, watch: Watch | None = None) -> str:
    """Return the identity of a checkpoint on any node: 32 hexadecimal digits.

    Kept hashes are used while the files are unchanged; otherwise every byte is read, and the hashes
    are kept. ``watch`` follows that. Raises :class:`CheckpointError` when a file cannot be read, or
    changes meanwhile.
    """
    if checkpoint.remote is not None:
        return checkpoint.remote.identity
    return hash_table_of(checkpoint, watch).identity


def hash_table_of(checkpoint: Stored, watch: Watch | None = None) -> HashTable:
    """Return the hashes of a checkpoint on this node; see :func:`identity_of`."""
    if checkpoint.hashes is not None:
        return checkpoint.hashes
    kept = read_kept(checkpoint)
    if kept is not None and kept.is_current:
        return _table(checkpoint, kept.leaves)
    if checkpoint.num_bytes >= LOGGED_BYTES:
        logger.info("%s", hashing_line(checkpoint))
    leaves = hash_tensors(checkpoint, watch)
    keep(checkpoint, leaves)
    return _table(checkpoint, leaves)


def hashing_line(checkpoint: Stored) -> str:
    """Return the line that says why a start takes long where no hashes are kept."""
    place = place_of(checkpoint)
    kept = "again at each start" if place is None else f"once; kept in {place}"
    return f"hashing {name_of(checkpoint.folder)}, {checkpoint.num_bytes / 1e9:.1f} GB: {kept}"


def kept_table_of(checkpoint: Stored, identity: str) -> HashTable | None:
    """Return kept hashes of a checkpoint on this node, without hashing it.

    They are current ones with any identity, or outdated ones with the given identity if samples of
    the files have these hashes. ``None`` is returned where no hashes are kept, and for other
    outdated ones. Raises :class:`CheckpointError` as :func:`check_samples` does.
    """
    kept = read_kept(checkpoint)
    if kept is None:
        return None
    table = _table(checkpoint, kept.leaves)
    if kept.is_current:
        return table
    if table.identity != identity:
        return None
    check_samples(checkpoint, table)
    return table


def check_samples(checkpoint: Stored, table: HashTable) -> None:
    """Verify at most :data:`SAMPLED_LEAVES` leaves of tensors that are evenly spaced by name.

    So another checkpoint is noticed at once, before bytes of it are needed. Raises
    :class:`CheckpointError` as :func:`experts.checkpoint.stored.read_into` does.
    """
    verified = replace(checkpoint, hashes=table)
    names = [name for name in sorted(checkpoint.tensors) if checkpoint.tensors[name].num_bytes]
    step = -(-len(names) // SAMPLED_LEAVES)
    for name in names[::step]:
        middle = checkpoint.tensors[name].num_bytes // 2
        read_range(verified, name, middle, middle + 1)  # verifies the whole leaf


def text_identity(checkpoint: Stored) -> str:
    """Return a hash over the files that turn text into tokens and back: 32 hexadecimal digits.

    These are the files of the tokenizer, the chat template and ``generation_config.json``
    (:data:`experts.checkpoint.small_files.TEXT_FILES`), on any node. Raises
    :class:`CheckpointError` when one cannot be read.
    """
    files = small_files_of(checkpoint)
    digest = blake3()
    for name in text_files_of(files):
        digest.update(blake3(name.encode()).digest() + blake3(files[name]).digest())
    return digest.hexdigest()[:IDENTITY_DIGITS]


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of hashing a checkpoint anew.

    ``kept`` tells whether hashes were kept before: ``equal`` ones, ``none``, or ``outdated`` ones
    of files that have been changed since. ``file`` keeps the new ones.
    """

    folder: Path
    identity: str
    num_bytes: int
    duration_s: float
    kept: Literal["equal", "none", "outdated"]
    file: Path | None


def verify_hashes(checkpoint: Stored, watch: Watch | None = None) -> Verification:
    """Hash every byte of a checkpoint on this node, and compare with the kept hashes.

    The new hashes are kept. Raises :class:`CheckpointError`, which names file and tensors, for
    other bytes in a file whose inode, size and times are those of the kept hashes. The kept hashes
    stay then.
    """
    kept = read_kept(checkpoint)
    started_at_s = time.monotonic()
    leaves = hash_tensors(checkpoint, watch)
    duration_s = time.monotonic() - started_at_s
    state: Literal["equal", "none", "outdated"] = "none"
    if kept is not None:
        changed = sorted(name for name in leaves if leaves[name] != kept.leaves[name])
        if changed and kept.is_current:
            raise CheckpointError(
                f"{len(changed)} tensors differ from the hashes that are kept in {kept.file}, "
                f"though the file looks unchanged: {listed_names(changed)}; fetch the file again, "
                "or remove the kept hashes to accept it",
                str(checkpoint.folder / checkpoint.tensors[changed[0]].file),
            )
        state = "outdated" if changed else "equal"
    return Verification(
        folder=checkpoint.folder,
        identity=_table(checkpoint, leaves).identity,
        num_bytes=checkpoint.num_bytes,
        duration_s=duration_s,
        kept=state,
        file=keep(checkpoint, leaves),
    )


def _table(checkpoint: Stored, leaves: Mapping[str, bytes]) -> HashTable:
    return HashTable.of(checkpoint.config, checkpoint.tensors, leaves)
