"""The experts of one layer on a device, computed together: two grouped products for all of them.

torch's ``grouped_mm`` multiplies consecutive groups of rows, each by a matrix of its own. Its
kernel on CUDA takes bfloat16, and matrices and rows that begin at multiples of 16 bytes
(``GroupMM.cu``, ``GroupedMMUtils.h``). Elsewhere torch has the same function as a loop, which
reads the groups' ends on the host; a loop of our own knows them. So :func:`choose_grouped_mm`
decides once, and says why where the answer is no.

A row's result must not depend on the other rows. torch promises nothing here, but its kernel adds
up a row's products in one order, along K in one tile, without splitting K. The one choice that
depends on other rows is that of the tiles' sizes on compute capability 9: one set up to
:data:`MAX_GROUP_ROWS` rows a group on average, another above. So no product has more. The loop has
no such order: cuBLAS chooses a kernel by the number of an expert's rows.

Dimension letters: E experts, P rows of all experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch.nn import functional

from cluster.device import has_broken, lacks_memory
from cluster.errors import first_line
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.ffn import Activation, clamped_gate, gate_up_product

GroupedMm = Callable[..., torch.Tensor]
"""(rows [P, K], matrices [E, K, N], ``offs`` int32 [E]) → [P, N].

``offs`` are the ends of the groups' rows; a group may be empty.
"""

MAX_GROUPS = 1023
"""The most experts of one product."""
MAX_GROUP_ROWS = 128
"""The most rows of one product, for each of its experts, whether or not they have rows."""
CAPABILITIES = (9, 10)
"""The generations of NVIDIA's cards for which torch has a kernel."""
_ALIGNMENT_BYTES = 16
_TRIAL_SIDE = 64

logger = logging.getLogger("expertmesh.actor")


def grouped_ffn(
    rows: torch.Tensor,
    weights: GatedFfnWeights[torch.Tensor],
    act: Activation,
    ends: torch.Tensor,
    grouped_mm: GroupedMm,
) -> torch.Tensor:
    """Apply E experts to rows [P, H], ordered by expert; returns [P, H].

    ``weights`` are those of all experts: ``gate_up`` [E, 2I, H], ``down`` [E, H, I]. ``ends`` is
    int32 [E]: expert e has the rows from ``ends[e - 1]`` to ``ends[e]``. Experts with biases
    (``gate_up_bias`` [E, 2I], ``down_bias`` [E, H]) are GPT-OSS's (:func:`clamped_gate`).
    """
    joined = grouped_mm(rows, weights.gate_up.transpose(-2, -1), offs=ends)  # [P, 2I]
    if weights.gate_up_bias is None:
        inner = gate_up_product(joined, act)
        return grouped_mm(inner, weights.down.transpose(-2, -1), offs=ends)
    assert weights.down_bias is not None
    numbers = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    expert_of_row = torch.bucketize(numbers, ends, out_int32=True, right=True)  # [P]
    inner = clamped_gate(joined + weights.gate_up_bias.index_select(0, expert_of_row))
    outer = grouped_mm(inner, weights.down.transpose(-2, -1), offs=ends)
    return outer + weights.down_bias.index_select(0, expert_of_row)


def choose_grouped_mm(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], num_experts: int
) -> GroupedMm | None:
    """Return torch's function for experts of ``sizes`` H and I, ``None`` for a loop over experts.

    The choice is logged, once a process for equal arguments.
    """
    return _choose(device, dtype, sizes, num_experts > MAX_GROUPS)


@functools.cache
def _choose(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], is_too_many: bool
) -> GroupedMm | None:
    grouped_mm = _grouped_mm()
    reason = f"a layer has more than {MAX_GROUPS}" if is_too_many else None
    reason = reason or _obstacle(grouped_mm, device, dtype, sizes)
    if reason is None:
        assert grouped_mm is not None
        reason = _failed_trial(grouped_mm, device, dtype)
    experts = f"experts of {sizes[0]} x {sizes[1]} in {dtype} on {device}"
    if reason is None:
        logger.info("%s: one grouped product per layer", experts)
        return grouped_mm
    logger.warning("%s: one product per expert, because %s", experts, reason)
    return None


def _grouped_mm() -> GroupedMm | None:
    """Return torch's grouped product; until torch 2.9 it has a private name."""
    found: GroupedMm | None = getattr(functional, "grouped_mm", None)
    return found or getattr(torch, "_grouped_mm", None)


def _obstacle(
    grouped_mm: GroupedMm | None,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int],
) -> str | None:
    """Return why torch has no kernel for such experts, ``None`` if it may have one."""
    if grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if any(size * dtype.itemsize % _ALIGNMENT_BYTES for size in sizes):
        return f"their rows are not multiples of {_ALIGNMENT_BYTES} bytes"
    if device.type == "xpu" or torch.version.hip is not None:
        return "there torch's grouped_mm may be a loop that waits for the device"
    if device.type != "cuda":
        return None
    if dtype != torch.bfloat16:
        return "torch's kernel takes only bfloat16"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in CAPABILITIES:
        return f"torch's kernel needs compute capability 9 or 10, not {capability}"
    return None


def _failed_trial(grouped_mm: GroupedMm, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a small grouped product has failed, ``None`` if it is right."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, _TRIAL_SIDE, generator=generator).to(dtype)
    matrices = torch.randn(3, _TRIAL_SIDE, _TRIAL_SIDE, generator=generator).to(dtype)
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    there = [tensor.to(device) for tensor in (rows, matrices, ends)]
    try:
        product = grouped_mm(there[0], there[1].transpose(-2, -1), offs=there[2]).cpu()
    except (RuntimeError, NotImplementedError) as error:
        if lacks_memory(error) or has_broken(error):
            raise
        return f"torch's grouped_mm fails ({first_line(error)})"
    pairs = ((rows[:3], matrices[0]), (rows[3:], matrices[2]))
    expected = torch.cat([functional.linear(part.float(), whole.float()) for part, whole in pairs])
    is_right = torch.allclose(product.float(), expected, rtol=0.02, atol=0.2)
    return None if is_right else "torch's grouped_mm gives wrong results"
