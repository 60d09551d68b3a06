"""The kernel class of a router's dense part: everything of a model but its experts."""

from __future__ import annotations

import torch

from cluster.device import CPU
from cluster.wire.tensors import dtype_name
from experts.compute.kernel_classes import torch_class
from experts.compute.native_ffn import kernel_class


def dense_class(device: torch.device, dtype: torch.dtype, is_native: bool, attention: str) -> str:
    """Return the kernel class of a dense part in ``dtype`` on ``device``.

    ``is_native`` is true where native code computes all of it, and false where torch computes what
    is between native products, norms and attention. Then the class names both. On a device it names
    the ``attention`` (:attr:`router.model.attention.Attention.name`), which differs between
    releases of torch and between cards.
    """
    own, native = torch_class(device, dtype), kernel_class(dtype_name(dtype))
    if device.type != CPU.type:
        return f"{own}+{attention}"
    if native is None:
        return own
    return native if is_native else f"{own}+{native}"
