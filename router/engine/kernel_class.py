"""The kernel class of a router's dense part: everything of a model but its experts."""

from __future__ import annotations

import torch

from cluster.device import CPU
from cluster.native import native
from cluster.wire.tensors import dtype_name
from experts.compute.kernel_classes import torch_class
from experts.compute.native_ffn import kernel_class


def why_not_native() -> str:
    """Return why torch computes part of the dense part on a CPU."""
    if native is None:
        return "computed by torch: the package was installed without its native code"
    return (
        "torch computes the rest around native products and norms: a layer is not of Llama's "
        "shape, or native code does not support its gate, dtype or sizes"
    )


def dense_class(device: torch.device, dtype: torch.dtype, is_native: bool, attention: str) -> str:
    """Return the kernel class of a dense part in ``dtype`` on ``device``.

    ``is_native`` is true if native code computes all of it, and false if torch computes what lies
    between native products, norms and attention. Then the class names both. On a device it names
    the ``attention`` (:attr:`router.model.attention.interface.Attention.name`), which differs
    between releases of torch and between cards.
    """
    own, of_products = torch_class(device, dtype), kernel_class(dtype_name(dtype))
    if device.type != CPU.type:
        return f"{own}+{attention}"
    if of_products is None:
        return own
    return of_products if is_native else f"{own}+{of_products}"
