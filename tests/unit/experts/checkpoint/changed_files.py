"""Checkpoints whose bytes change under the eyes of those who read them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from experts.checkpoint.checkpoint import open_checkpoint


def flip(file: Path, offset: int, length: int = 1) -> None:
    """Change bytes in place, and put the file's mtime back."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(offset)
        data = opened.read(length)
        opened.seek(offset)
        opened.write(bytes(byte ^ 1 for byte in data))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def flip_in_tensor(folder: Path, name: str, begin: int = 0, length: int = 1) -> None:
    """Change bytes of a tensor from ``begin`` on, as :func:`flip` does."""
    info = open_checkpoint(folder).tensors[name]
    flip(folder / info.file, info.begin + begin, length)


def replace(file: Path, other: Path) -> None:
    """Put a copy of another file in a file's place, by a rename."""
    copy = file.with_name("copy")
    copy.write_bytes(other.read_bytes())
    copy.rename(file)


def header_of(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return a safetensors file's header, and where its data begins; read as the format says."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length
