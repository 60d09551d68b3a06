"""The experts' native code with AMX tiles in plain C, as a module of its own.

So the kernel "amx" runs on any x86-64 processor. Its arithmetic is that of Intel's manual
(``amx.h``), and what a processor with AMX does beside it is the portable kernel's.
"""

from __future__ import annotations

import importlib.util
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from tests.native.sources import INCLUDES, SOURCES

HERE = Path(__file__).parent
NAME = "emulated_amx"
IS_POSSIBLE = sys.platform == "linux" and platform.machine() == "x86_64"
"""Whether the sources have AMX at all."""


def build(folder: Path) -> Path:
    """Compile the module into a folder, by the compiler that Python was built with."""
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    sources = [HERE / "amx_module.c"]
    sources += [one for one in SOURCES if one.stem in ("kernels", "experts", "pool", "tiles")]
    built = folder / f"{NAME}.so"
    subprocess.run(
        [
            *compiler, "-shared", "-fPIC", "-pthread", "-O1", "-ffp-contract=off", "-w",
            *INCLUDES, "-include", HERE / "amx.h",
            *sources, "-o", built, "-lm",
        ],
        check=True,
        timeout=100,
    )  # fmt: skip
    return built


def load(built: Path) -> ModuleType:
    """Return the module that was built at a path."""
    spec = importlib.util.spec_from_file_location(NAME, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
