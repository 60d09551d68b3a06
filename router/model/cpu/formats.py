"""The formats of numbers in native code, by torch's dtypes."""

from __future__ import annotations

from cluster.wire.tensors import TORCH_DTYPES
from experts.compute import panels

FORMATS = {TORCH_DTYPES[name]: number for name, number in panels.FORMATS.items()}
"""The number of each dtype in native code."""
