"""Checks that a router's device has memory for its largest step, beside weights and cache."""

from __future__ import annotations

import logging

import torch

from cluster.device import CPU, free_bytes
from experts.checkpoint.checkpoint import Checkpoint
from router.config.deployment import RouterConfig
from router.model.attention.varlen import VarlenAttention
from router.model.memory import StepLimits, router_sizes
from router.model.model import MoEModel

logger = logging.getLogger("expertmesh.router")


def warn_of_steps(
    model_id: str,
    checkpoint: Checkpoint,
    dense: MoEModel,
    config: RouterConfig,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Log a warning if ``device`` has less memory than the largest step may take.

    ``expertmesh plan`` assumes that attention reads the cache's pages in place where possible. A
    device whose torch refuses that gathers them, which takes more. A step without enough memory is
    computed in halves; a request that lacks memory even alone fails with :class:`OverloadedError`.
    """
    if device == CPU:
        return
    reads_pages = isinstance(dense.attention, VarlenAttention)
    sizes = router_sizes(checkpoint.family, checkpoint.config)
    limits = StepLimits.of(config, max_model_len)
    needed_bytes = sizes.step_bytes(limits, dtype.itemsize, reads_pages)
    left_bytes = free_bytes(device)
    if needed_bytes > left_bytes:
        logger.warning(
            "router of %s: its largest step may take %s bytes on %s, which has %s free; lower "
            "router.max_batch_size, router.max_batch_tokens or the model's max_model_len",
            model_id,
            f"{needed_bytes:,}",
            device,
            f"{left_bytes:,}",
        )
