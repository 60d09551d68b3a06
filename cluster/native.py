"""Native code of the data plane: the C files beside this, built when the package is installed.

``native`` is the module, or ``None`` if there was no C compiler; then Python, numpy and torch
do the same, with the same errors. Messages and rows then have the same bits. The dense part,
experts and draws have other bits: native sums have an order of their own. Each function has one
face, which
is what others call: :mod:`router.moe.permute`, :mod:`router.moe.combine`,
:mod:`router.model.cpu.native_attention`, :mod:`router.model.cpu.native_layer`,
:mod:`router.model.cpu.native_modules`, :mod:`experts.compute.native_ffn`,
:mod:`router.engine.sampling`, :mod:`cluster.wire.tensors`,
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
