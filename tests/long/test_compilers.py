"""Native code has the same bits by every compiler, with any options but those on contraction."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cluster.native import native
from tests.native.digests import digests
from tests.native.sources import INCLUDES, SOURCES

ROOT = Path(__file__).parents[2]
MODULE = "expertmesh_native"
COMPILERS = [path for name in ("gcc", "clang", "clang-14") if (path := shutil.which(name))]
OPTIONS = [("-O1",), ("-O2",), ("-O3", "-march=native")]


WIDE = (" avx512", " avx512_bf16", " amx")
"""How the names of results end that need more than AVX2."""


def built(folder: Path, compiler: str, *options: str) -> dict[str, str]:
    """Return the digests of the results of a module that is built in ``folder``."""
    module = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [compiler, "-shared", "-fPIC", "-pthread", "-w", *options, "-ffp-contract=off"]
    command += [*INCLUDES, "-o", str(module)]
    subprocess.run([*command, *map(str, SOURCES), "-lm"], check=True, timeout=300)
    run = subprocess.run(
        [sys.executable, "-P", "-m", "tests.native.digests"],  # without the checkout's own module
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        check=True,
        stdout=subprocess.PIPE,
        timeout=300,
    )
    result = json.loads(run.stdout)
    assert result["module"] == str(module)
    found: dict[str, str] = result["digests"]
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("compiler", [] if native is None else COMPILERS)
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_result_has_the_bits_of_the_installed_module(
    tmp_path: Path, compiler: str, options: tuple[str, ...]
) -> None:
    assert built(tmp_path, compiler, *options) == digests()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("compiler", [] if native is None else COMPILERS)
def test_a_module_that_ends_at_avx2_has_the_bits_of_these_kernels(
    tmp_path: Path, compiler: str
) -> None:
    narrow = built(tmp_path, compiler, "-O2", "-DWITHOUT_AVX512")
    assert narrow == {name: bits for name, bits in digests().items() if not name.endswith(WIDE)}
