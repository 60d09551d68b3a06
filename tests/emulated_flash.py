"""Variable-length attention on an emulated device: each sequence and head by itself, in float32.

It demands what FlashAttention 2 demands on CUDA: with a page table too, both ends of queries and of
keys are set. What comes out has the shape and dtype that torch's own rule for tensors without
values says; that rule looks at the queries alone.

Dimension letters: T tokens, Q query heads, N pages, P slots of a page, G key/value heads, D head
size, B sequences, M pages of the longest one.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

DEMANDS = {
    "both ends or none": lambda a: (a["cu_seq_q"] is None) == (a["cu_seq_k"] is None),
    "half precision": lambda a: (
        a["query"].dtype in (torch.float16, torch.bfloat16)
        and a["query"].dtype == a["key"].dtype == a["value"].dtype
    ),
    "pages of a multiple of 256": lambda a: a["key"].dim() == 4 and a["key"].shape[1] % 256 == 0,
    "keys as values": lambda a: a["key"].shape == a["value"].shape,
    "heads of a multiple of 8 up to 256": lambda a: (
        a["query"].shape[-1] == a["key"].shape[-1]
        and a["query"].shape[-1] % 8 == 0
        and a["query"].shape[-1] <= 256
    ),
    "as many query heads to each other one": lambda a: (
        a["enable_gqa"] and a["query"].shape[1] % a["key"].shape[2] == 0
    ),
    "contiguous values of a head": lambda a: (
        a["query"].stride(-1) == a["key"].stride(-1) == a["value"].stride(-1) == 1
    ),
    "int32 tables": lambda a: all(
        a[name].dtype == torch.int32 and a[name].is_contiguous()
        for name in ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table")
    ),
    "tables of all sequences": lambda a: (
        len(a["cu_seq_q"]) - 1 == len(a["seqused_k"]) == len(a["block_table"])
    ),
    "the ends of the keys": lambda a: torch.equal(
        a["cu_seq_k"], torch.nn.functional.pad(a["seqused_k"].cumsum(0), (1, 0)).int()
    ),
    "no splits": lambda a: a["num_splits"] == 1,
}
NAMES = (
    *("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale"),
    *("window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"),
)


def varlen_attention(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``torch_attn::_varlen_attn`` over tensors of the host; raises ``RuntimeError``."""
    given: dict[str, Any] = dict(zip(NAMES, args, strict=True))
    for demand, is_met in DEMANDS.items():
        if not is_met(given):
            raise RuntimeError(f"variable-length attention demands {demand}")
    query, (left, right) = given["query"], given["window_size"]
    ends, lengths = given["cu_seq_q"].tolist(), given["seqused_k"].tolist()
    output = torch.full_like(query, torch.nan)
    for b, (begin, end) in enumerate(itertools.pairwise(ends)):
        pages = given["block_table"][b].long()
        length, count = lengths[b], end - begin
        assert count <= given["max_q"]
        assert length <= min(given["max_k"], len(pages) * given["key"].shape[1])
        keys = given["key"][pages].flatten(0, 1)[:length].float()  # [L, G, D]
        values = given["value"][pages].flatten(0, 1)[:length].float()
        at, key = torch.arange(length - count, length)[:, None], torch.arange(length)[None, :]
        seen = (key <= at + right) if right >= 0 else torch.ones(count, length, dtype=torch.bool)
        if left >= 0:
            seen &= key >= at - left
        for head in range(query.shape[1]):
            g = head * keys.shape[1] // query.shape[1]
            scores = query[begin:end, head].float() @ keys[:, g].mT * given["scale"]
            shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            output[begin:end, head] = (shares @ values[:, g]).to(query.dtype)
    meta = torch.ops.torch_attn._varlen_attn(
        *(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args)
    )[0]
    assert (meta.shape, meta.dtype) == (output.shape, output.dtype)
    return output, output.new_empty(0), output.new_empty(0)
