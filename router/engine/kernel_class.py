"""The kernel class of a router's dense part: everything of a model but its experts."""

from __future__ import annotations

import torch

from cluster.device import CPU
from cluster.native.built import native
from experts.compute.kernel_classes import torch_class


def dense_class(device: torch.device, dtype: torch.dtype) -> str:
    """Return the kernel class of a dense part in ``dtype`` on ``device``.

    Its products are torch's. Native code on a CPU attends by other formulas than torch, so a router
    with native code and one without are of two classes.
    """
    own = torch_class(device, dtype)
    return own if native is None or device.type != CPU.type else f"{own}+native"
