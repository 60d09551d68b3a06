"""Native code of the data plane: the C files beside this, built when the package is installed.

``native`` is the module, or ``None`` where there was no C compiler; then Python, numpy and torch
do the same, bit for bit and with the same errors; only attention is computed another way then. Each
of its functions has one face, which is what others call: :mod:`router.rows`, :mod:`router.combine`,
:mod:`router.decoding`, :mod:`router.attention`, :mod:`router.norms`, :mod:`router.cache`,
:mod:`experts.tiled`, :mod:`cluster.frames`, :mod:`cluster.tensors`, :mod:`cluster.stream.channel`.
"""

from __future__ import annotations

from types import ModuleType

try:
    import expertmesh_native
except ImportError:
    native: ModuleType | None = None
else:
    native = expertmesh_native
