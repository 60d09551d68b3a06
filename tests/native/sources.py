"""The C files of the native module, and how a compiler finds their headers."""

from __future__ import annotations

import sysconfig
from pathlib import Path

NATIVE = Path(__file__).parents[2] / "native"
SOURCES = sorted(NATIVE.rglob("*.c"))
INCLUDES = [
    word
    for folder in (sysconfig.get_paths()["include"], NATIVE, *filter(Path.is_dir, NATIVE.iterdir()))
    for word in ("-I", str(folder))
]
