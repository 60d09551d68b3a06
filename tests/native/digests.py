"""Digests of the results of native code, by function, kernel, dtype and shape.

Two builds of the module compute the same bits if their digests are equal. A process prints those of
the module that it imports: ``python -m tests.native.digests``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from cluster.native import native
from cluster.wire.tensors import to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.native_ffn import KERNELS, NATIVE_ACTIVATIONS, NativeFfn
from router.model.cpu import native_attention
from router.model.cpu.formats import FORMATS
from router.model.cpu.native_modules import LAYER_NORM, ROOT_MEAN_SQUARE, NativeLinear
from tests.arrays import on_host
from tests.unit.router.model.cpu.attention_cases import make, one_by_one, one_prefill

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_COUNTS = (1, 2, 5, 7, 12, 50)
GATES = ((0, 0, 1, 0, 1, 1, 1), (1, 0, 1, 0, 4, 2, 2), (2, 0, 0, 0, 1, 1, 1), (0, 1, 0, 1, 4, 2, 1))
"""Scores and choices as ``choose`` takes them."""
Named = Iterator[tuple[str, torch.Tensor]]


def digests() -> dict[str, str]:
    """Return a digest of every result, by the name of what was computed."""
    results = (ffns, linears, norms, layers, gates, attentions)
    return {
        name: hashlib.sha256(to_bytes(tensor)).hexdigest()[:16]
        for compute in results
        for name, tensor in compute()
    }


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def ffns() -> Named:
    """Experts with every activation, and with biases."""
    assert native is not None
    hidden, inner = 70, 45
    for dtype in DTYPES:
        gate_up, down = numbers(2 * inner, hidden, dtype=dtype), numbers(hidden, inner, dtype=dtype)
        biases = numbers(2 * inner, dtype=dtype), numbers(hidden, dtype=dtype)
        gate_up = gate_up * 0.3
        plain = on_host(GatedFfnWeights(gate_up, down))
        biased = on_host(GatedFfnWeights(gate_up, down, *biases))
        experts = {name: NativeFfn(plain, name, 1) for name in NATIVE_ACTIVATIONS}
        experts["biased"] = NativeFfn(biased, "silu", 1)
        for activation, expert in experts.items():
            for count in ROW_COUNTS:
                rows = numbers(count, hidden, dtype=dtype)
                for kernel, *_ in KERNELS:
                    out = torch.empty_like(rows)
                    given = to_bytes(rows), (count,), (expert.packed,), to_bytes(out)
                    native.ffn(*given, expert.shape, 1, kernel)
                    yield f"ffn {activation} {dtype} {count} {kernel}", out


def linears() -> Named:
    assert native is not None
    for dtype in DTYPES:
        layer = NativeLinear(numbers(77, 131, dtype=dtype), numbers(77, dtype=dtype))
        for row_dtype in DTYPES:
            for count in ROW_COUNTS:
                rows, out = numbers(count, 131, dtype=row_dtype), torch.empty(count, 77)
                formats = FORMATS[dtype], FORMATS[row_dtype], FORMATS[out.dtype], 1
                for kernel, *_ in KERNELS:
                    given = to_bytes(rows), layer.packed, to_bytes(out)
                    native.linear(*given, (1, 131, 77, *formats), 1, kernel)
                    yield f"linear {dtype} {row_dtype} {count} {kernel}", out


def norms() -> Named:
    assert native is not None
    for dtype in DTYPES:
        for size in (1, 31, 32, 65, 500):
            for kind in (ROOT_MEAN_SQUARE, LAYER_NORM):
                rows, weights = numbers(3, size, dtype=dtype), numbers(size)
                out = torch.empty_like(rows)
                sizes = size, FORMATS[dtype], FORMATS[dtype], kind
                native.normalise(to_bytes(rows), to_bytes(weights), to_bytes(out), sizes, 1e-5)
                yield f"norm {kind} {dtype} {size}", out


def layers() -> Named:
    """Queries, keys and values with every part that a layer can have; outputs."""
    assert native is not None
    tokens, hidden, num_q, num_kv, size = 11, 76, 6, 2, 10
    outputs = (num_q + 2 * num_kv) * size
    for dtype in DTYPES:
        inputs = NativeLinear(numbers(outputs, hidden, dtype=dtype), numbers(outputs, dtype=dtype))
        output = NativeLinear(numbers(hidden, num_q * size, dtype=dtype))
        rows, angles = numbers(tokens, hidden, dtype=dtype), numbers(tokens, 2, size // 2)
        attended = numbers(tokens, num_q * size, dtype=dtype)
        norm, head_norms = numbers(hidden), numbers(2 * size)
        number = FORMATS[dtype]
        sizes = hidden, num_q, num_kv, size, number, number, 1, ROOT_MEAN_SQUARE, size, size
        for kernel, *_ in KERNELS:
            heads = torch.empty(tokens, outputs, dtype=dtype)
            parts = rows, norm, inputs.packed, angles, head_norms, heads
            given = [p if isinstance(p, memoryview) else to_bytes(p) for p in parts]
            native.attention_inputs(*given, sizes, (1e-5, 1e-6, 2.5), 1, kernel)
            yield f"attention_inputs {dtype} {kernel}", heads
            sums, normed = torch.empty_like(rows), torch.empty_like(rows)
            parts = attended, output.packed, rows, norm, sums, normed
            given = [p if isinstance(p, memoryview) else to_bytes(p) for p in parts]
            out_sizes = num_q * size, hidden, number, number, 0, LAYER_NORM
            native.attention_outputs(*given, out_sizes, 1e-5, 1, kernel)
            yield f"attention_outputs {dtype} {kernel}", torch.stack((sums, normed))


def gates() -> Named:
    """Weights of chosen experts; ids follow from the same logits."""
    assert native is not None
    num_experts, top_k, hidden = 16, 4, 48
    weight, correction = numbers(num_experts, hidden) * 0.2, numbers(num_experts) * 0.1
    layer = NativeLinear(weight)
    rows = numbers(40, hidden)
    for spec in GATES:
        for kernel, *_ in KERNELS:
            ids = torch.empty((40, top_k), dtype=torch.int64)
            weights = torch.empty(40, top_k)
            native.choose(
                to_bytes(rows), layer.packed, to_bytes(correction), None, to_bytes(ids),
                to_bytes(weights), (hidden, num_experts, top_k, 0, 0, 0, 0, *spec),
                (1.5, -math.inf if spec[0] == 2 else -9.0), 1, kernel, None,
            )  # fmt: skip
            yield f"choose {spec} {kernel}", torch.cat((ids.float(), weights))


def attentions() -> Named:
    shapes: tuple[dict[str, Any], ...] = (
        {"heads": 4, "size": 40, "softcap": 30.0, "has_sinks": True},
        {"heads": 3, "size": 33, "window": 20},
        {"heads": 9, "size": 48, "value_size": 32},
    )
    for dtype in DTYPES:
        for index, shape in enumerate(shapes):
            case = make(index, lengths=[37, 5, 80], dtype=dtype, **shape)
            for kernel, _ in native_attention.KERNELS:
                for steps in (one_prefill(case), one_by_one(case)):
                    out = torch.cat([part.flatten() for part in case.run(steps, kernel)])
                    yield f"attend {dtype} {index} {len(steps)} {kernel}", out


if __name__ == "__main__":
    print(json.dumps({"module": native and native.__file__, "digests": digests()}))
