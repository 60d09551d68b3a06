"""``--avx2``: a wider processor is used as one that ends at AVX2, as most laptops do."""

from __future__ import annotations

import argparse
import os

from experts.compute.native_ffn import KERNELS

KERNEL = (("avx2", "fused", "fused"),)
"""The fastest native kernel of such a processor."""
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Variables by which torch and its libraries use a wider processor as one that ends at AVX2."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--avx2`` to a benchmark's options."""
    parser.add_argument(
        "--avx2",
        action="store_true",
        help="as on a processor that ends at AVX2; needs ExpertMesh built with -DWITHOUT_AVX512",
    )


def use_alone(parser: argparse.ArgumentParser) -> None:
    """Have all processes that start from now on use AVX2 alone.

    Ends the program by the parser's error where the native code is not built for that.
    """
    if KERNELS[:1] != KERNEL:
        here = ", ".join(name for name, *_ in KERNELS) or "not been built"
        parser.error(
            f"--avx2: the native code here has {here}; install it with "
            "CFLAGS=-DWITHOUT_AVX512 pip install ."
        )
    os.environ.update(ENVIRONMENT)
