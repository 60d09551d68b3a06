"""The kept hashes of a checkpoint, so that its bytes are hashed once.

They are kept in a file beside the checkpoint. Where its folder cannot be written, and for the
bundled models, the file is in ``$XDG_CACHE_HOME/expertmesh`` (by default ``~/.cache/expertmesh``).
Kept hashes are current while path, inode, size, mtime and ctime of every file of the checkpoint
are as they were. A file that is damaged, or of another version, is refused with a warning.

The file consists of :data:`_MAGIC`, the version, the length of the header, the header (msgpack),
the leaves of all tensors in the header's order, and BLAKE3 over all of that. It is written under
another name and renamed, so a reader never sees a part of it, and of several writers the last wins.
"""

from __future__ import annotations

import importlib.resources
import logging
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from blake3 import blake3

from experts.checkpoint import hashes
from experts.checkpoint.shards import MAX_HEADERS_BYTES
from experts.checkpoint.stored import Stored

VERSION = 1
BESIDE = ".expertmesh-hashes"
"""The file's name beside a checkpoint."""
MAX_FILE_BYTES = 1 << 30
"""The most bytes of a file, for a checkpoint of about 8 TB."""
_MAGIC = b"expertmesh hashes\n"
_NUMBERS = struct.Struct("<II")
"""The version, and the bytes of the header."""

logger = logging.getLogger("expertmesh.hashes")


@dataclass(frozen=True, slots=True)
class KeptHashes:
    """The leaves in ``file`` by tensor; ``is_current`` tells whether no file has changed since."""

    file: Path
    leaves: Mapping[str, bytes]
    is_current: bool


class _UnusableError(Exception):
    """A file of kept hashes cannot be used; the message is the reason."""


def read_kept(checkpoint: Stored) -> KeptHashes | None:
    """Return the kept hashes of a checkpoint's tensors, preferably current ones.

    A file that is damaged or of another version is named in a warning, and is not used.
    """
    outdated = None
    for file in _places(checkpoint):
        kept = _read(checkpoint, file)
        if kept is not None and kept.is_current:
            return kept
        outdated = outdated or kept
    return outdated


def keep(checkpoint: Stored, leaves: Mapping[str, bytes]) -> Path | None:
    """Keep the leaves of all tensors; returns the file.

    Where no file can be written the reason is logged, and the result is ``None``.
    """
    content = _encode(checkpoint, leaves)
    reasons = []
    for file in _places(checkpoint):
        try:
            if file.name != BESIDE:
                file.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(file, content)
            return file
        except OSError as error:
            reasons.append(f"{file}: {error.strerror}")
    logger.warning(
        "cannot save the hashes of %s (%s), so each process hashes the checkpoint again; set "
        "XDG_CACHE_HOME to a folder that can be written",
        checkpoint.folder,
        "; ".join(reasons),
    )
    return None


def place_of(checkpoint: Stored) -> Path | None:
    """Return the file in which hashes will be kept if it can be written; ``None`` without one."""
    places = _places(checkpoint)
    writable = (file for file in places if os.access(file.parent, os.W_OK))
    return next(writable, places[-1] if places else None)


def _places(checkpoint: Stored) -> list[Path]:
    """Return the files in which hashes are looked for and kept, the first choice first."""
    path = checkpoint.folder.resolve()
    bundled = Path(str(importlib.resources.files("deploy"))).resolve()
    places = [] if path.is_relative_to(bundled) else [path / BESIDE]
    # A relative path is to be ignored (XDG Base Directory Specification 0.8). Without a home the
    # second path is relative, too.
    caches = (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))
    cache = next((Path(folder) for folder in caches if Path(folder).is_absolute()), None)
    if cache is not None:
        name = blake3(os.fsencode(path)).hexdigest()[:32]
        places.append(cache / "expertmesh" / "hashes" / name)
    return places


def _read(checkpoint: Stored, file: Path) -> KeptHashes | None:
    try:
        if not file.is_file():
            return None
        if file.stat().st_size > MAX_FILE_BYTES:
            raise _UnusableError(f"it is larger than {MAX_FILE_BYTES} bytes")
        header, leaves = _decode(file.read_bytes())
    except OSError as error:
        logger.warning("cannot read the saved hashes %s: %s", file, error.strerror)
        return None
    except _UnusableError as error:
        logger.warning("ignoring saved hashes %s: %s", file, error)
        return None
    wanted = {name: info.num_bytes for name, info in checkpoint.tensors.items()}
    if any(header["tensors"].get(name) != num_bytes for name, num_bytes in wanted.items()):
        return None  # of another checkpoint that was under this path
    return KeptHashes(
        file,
        {name: leaves[name] for name in wanted},
        all(header[key] == value for key, value in _source(checkpoint).items()),
    )


def _source(checkpoint: Stored) -> dict[str, Any]:
    """Return what must be equal while kept hashes are current."""
    return {
        "folder": os.fsencode(checkpoint.folder.resolve()),
        "files": {file: list(stamp) for file, stamp in checkpoint.stamps.items()},
    }


def _encode(checkpoint: Stored, leaves: Mapping[str, bytes]) -> bytes:
    tensors = {name: info.num_bytes for name, info in checkpoint.tensors.items()}
    header = msgpack.packb(
        {**_source(checkpoint), "leaf_bytes": hashes.LEAF_BYTES, "tensors": tensors}
    )
    numbers = _NUMBERS.pack(VERSION, len(header))
    content = b"".join([_MAGIC, numbers, header, *(leaves[name] for name in tensors)])
    return content + blake3(content).digest()


def _decode(content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a file's header, and the leaves by tensor; raises :class:`_UnusableError`."""
    start = len(_MAGIC) + _NUMBERS.size
    if len(content) < start + hashes.HASH_BYTES or not content.startswith(_MAGIC):
        raise _UnusableError("the file is corrupt")
    version, header_bytes = _NUMBERS.unpack_from(content, len(_MAGIC))
    if version != VERSION:
        raise _UnusableError(f"they have version {version}, this build reads {VERSION}")
    end = len(content) - hashes.HASH_BYTES
    if blake3(memoryview(content)[:end]).digest() != content[end:]:
        raise _UnusableError("the file is corrupt")
    if header_bytes > min(MAX_HEADERS_BYTES, end - start):
        raise _UnusableError("the header is too long")
    try:
        header = _checked(msgpack.unpackb(content[start : start + header_bytes]))
    except (ValueError, msgpack.UnpackException) as error:
        raise _UnusableError(f"the header is wrong ({error})") from None
    leaves, place = {}, start + header_bytes
    for name, num_bytes in header["tensors"].items():
        size = hashes.num_leaves(num_bytes) * hashes.HASH_BYTES
        leaves[name] = content[place : place + size]
        place += size
    if place != end:
        raise _UnusableError("the number of leaves is wrong")
    return header, leaves


def _checked(header: Any) -> dict[str, Any]:
    """Return a header whose values have the right types; raises ``ValueError``."""
    keys = {"folder": bytes, "files": dict, "leaf_bytes": int, "tensors": dict}
    if not isinstance(header, dict) or header.keys() != keys.keys():
        raise ValueError("its keys")
    if any(type(header[key]) is not kind for key, kind in keys.items()):
        raise ValueError("the types of its values")
    if header["leaf_bytes"] != hashes.LEAF_BYTES:
        raise ValueError(f"leaves of {header['leaf_bytes']} bytes")
    if any(type(name) is not str for name in header["tensors"]) or any(
        type(num_bytes) is not int or num_bytes < 0 for num_bytes in header["tensors"].values()
    ):
        raise ValueError("its tensors")
    return header


def _write_whole(file: Path, content: bytes) -> None:
    """Write a file under another name and rename it; raises ``OSError``, and leaves nothing."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
