"""The tests of native code against code that watches its own accesses and sums."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.native.sources import INCLUDES, NATIVE, SOURCES

ROOT = Path(__file__).parents[2]
MODULE = "expertmesh_native"
TESTS = (
    "tests/unit/router/model/cpu",
    "tests/unit/router/model/test_kv_cache.py",
    "tests/unit/cluster/transport/test_long_frames.py",
    "tests/unit/experts/test_lone.py",
    "tests/unit/experts/compute/test_native_ffn.py",
    "tests/unit/router/moe/test_permute.py",
    "tests/unit/router/moe/test_exchange.py",
    "tests/unit/router/engine/test_sampling.py",
)
# Many threads and long sequences take long there. Tests of "shares" go the same ways in short.
LEFT_OUT = "not threads"
LIBRARIES = "libasan.so", "libubsan.so"


COMPILERS = [path for path in [shutil.which("gcc")] if path]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_native_code_touches_nothing_beyond_its_buffers(tmp_path: Path, compiler: str) -> None:
    built = tmp_path / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [compiler, "-std=gnu11", "-shared", "-fPIC", "-O1", "-g", "-ffp-contract=off"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command += [*INCLUDES, "-o", str(built)]
    subprocess.run([*command, *map(str, SOURCES), "-lpthread"], check=True, timeout=600)
    # The first module of the name is the one that counts, and the checkout may hold another.
    site = f"import {MODULE} as m\nif m.__file__ != {str(built)!r}: raise SystemExit(m.__file__)\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in LIBRARIES
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "PYTHONPATH": str(tmp_path),
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-k", LEFT_OUT, *TESTS]
    result = subprocess.run(
        tests, cwd=ROOT, env=environment, timeout=900, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_threads_of_the_pool_do_not_race(tmp_path: Path, compiler: str) -> None:
    program = tmp_path / "pool"
    command = [compiler, "-std=gnu11", "-O1", "-g", "-fsanitize=thread", "-o", str(program)]
    command += INCLUDES
    sources = [NATIVE / "pool.c", ROOT / "tests/long/pool_driver.c"]
    subprocess.run([*command, *map(str, sources), "-lpthread"], check=True, timeout=600)
    result = subprocess.run([program], timeout=300, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "all calls have returned\n"), result.stderr
