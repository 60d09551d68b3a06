"""Native code of the data plane: the C files beside this, built when the package is installed.

``native`` is the module, or ``None`` where there was no C compiler; then Python, numpy and torch
do the same, bit for bit and with the same errors; only attention is computed another way then. Each
of its functions has one face, which is what others call: :mod:`router.moe.permute`,
:mod:`router.moe.combine`,
:mod:`router.model.cpu.native_attention`, :mod:`router.model.fused_attention`,
:mod:`router.model.cpu.rms_norm`, :mod:`router.model.kv_cache`,
:mod:`experts.compute.native_ffn`, :mod:`cluster.wire.tensors`,
:mod:`cluster.transport.stream.channel`.
"""

from __future__ import annotations

from types import ModuleType

try:
    import expertmesh_native
except ImportError:
    native: ModuleType | None = None
else:
    native = expertmesh_native
