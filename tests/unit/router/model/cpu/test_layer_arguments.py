"""What the native functions of a layer refuse: sizes and buffers that do not fit each other.

Dimension letters: H hidden size, Q query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cluster import native as built
from cluster.wire.tensors import to_bytes
from experts.compute.native_ffn import KERNELS

BUILT = [] if built.native is None else [built.native]
H, Q, G, D = 40, 4, 2, 6
OUTPUTS = (Q + 2 * G) * D


def inputs_by(
    native: ModuleType, kernel: str | None, threads: int = 1, **changes: Any
) -> torch.Tensor:
    """Return queries, keys and values of seven tokens, with every part that a layer can have."""
    generator = torch.Generator().manual_seed(1)
    tokens = 7
    call: dict[str, Any] = {
        "rows": torch.randn(tokens, H, generator=generator),
        "norm": torch.randn(H, generator=generator),
        "packed": bytes(to_bytes(torch.randn(H * 64 + 64, generator=generator))),
        "angles": torch.randn(tokens, 2, D // 2, generator=generator),
        "head_norms": torch.randn(2 * D, generator=generator),
        "out": torch.zeros(tokens, OUTPUTS),
        "sizes": (H, Q, G, D, 0, 0, 1, 1, D, D),
        "factors": (1e-5, 1e-6, 2.5),
        **changes,
    }
    parts = [v if isinstance(v, bytes) else to_bytes(v) for v in list(call.values())[:6]]
    native.attention_inputs(*parts, call["sizes"], call["factors"], threads, kernel)
    return call["out"]


@pytest.mark.parametrize("native", BUILT)
def test_kernels_of_a_class_and_any_threads_have_equal_bits(native: ModuleType) -> None:
    first: dict[str, torch.Tensor] = {}
    for name, kernel_class, _ in KERNELS:
        for threads in (1, 3):
            got = inputs_by(native, name, threads)
            assert torch.equal(got, first.setdefault(kernel_class, got))
    values = list(first.values())
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-4, atol=1e-5)
    assert values[0].abs().max() <= 2.5 * 2**0.5 * 4  # clipped, then turned


WRONG: dict[str, dict[str, Any]] = {
    "half a row": {"rows": torch.zeros(H + 1)},
    "a token without room": {"out": torch.zeros(6, OUTPUTS)},
    "a token without angles": {"angles": torch.zeros(6, 2, D // 2)},
    "a norm of another size": {"norm": torch.zeros(H - 1)},
    "weights of another size": {"packed": bytes(4)},
    "head norms of another size": {"head_norms": torch.zeros(D)},
    "an odd head": {"sizes": (H, Q, G, 5, 0, 0, 1, 1, 5, 5)},
    "no head": {"sizes": (H, 0, G, D, 0, 0, 1, 1, D, D)},
    "head norms that divide nothing": {"sizes": (H, Q, G, D, 0, 0, 1, 1, 5, 7)},
    "an unknown norm": {"sizes": (H, Q, G, D, 0, 0, 1, 3, D, D)},
    "an unknown format": {"sizes": (H, Q, G, D, 0, 4, 1, 1, D, D)},
    "a bias that is not there": {"sizes": (H, Q, G, D, 0, 0, 0, 1, D, D)},
}


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_do_not_fit_are_refused(native: ModuleType, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        inputs_by(native, None, **WRONG[wrong])


OUTPUT_SIZES = (24, H, 0, 0, 0, 1)
WRONG_OUTPUTS: dict[str, dict[str, Any]] = {
    "half a row": {"attended": bytes(4 * 25)},
    "a residual too many": {"residual": bytes(4 * H * 3)},
    "too little room": {"sums": 4 * H},
    "too little room for the norm": {"normed": 4 * H},
    "weights of another size": {"packed": bytes(8)},
    "a norm of another size": {"norm": bytes(4)},
    "an unknown norm": {"sizes": (*OUTPUT_SIZES[:5], 0)},
}


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("wrong", [None, *WRONG_OUTPUTS])
def test_outputs_that_do_not_fit_are_refused(native: ModuleType, wrong: str | None) -> None:
    call: dict[str, Any] = {
        "attended": bytes(4 * 24 * 2),
        "packed": bytes(24 * 64 * 4),
        "residual": bytes(4 * H * 2),
        "norm": bytes(4 * H),
        "sums": 4 * H * 2,
        "normed": 4 * H * 2,
        "sizes": OUTPUT_SIZES,
        **(WRONG_OUTPUTS[wrong] if wrong else {}),
    }
    arguments = (
        *(call[name] for name in ("attended", "packed", "residual", "norm")),
        bytearray(call["sums"]),
        bytearray(call["normed"]),
        call["sizes"],
        1e-5,
        1,
        None,
    )
    if wrong is None:
        native.attention_outputs(*arguments)
        return
    with pytest.raises(ValueError, match=r"."):
        native.attention_outputs(*arguments)


TOKENS, PAGES = 3, 2
HALF: dict[str, Any] = {
    "residual": bytearray(4 * H * TOKENS),
    "last output": bytes(4 * H * TOKENS),
    "angles": bytes(4 * D * TOKENS),
    "slots": np.array([1, 2, 3]),
    "spans": np.array([[0, TOKENS, 1, 0]]),
    "pages": np.array([0]),
    "out": bytearray(4 * H * TOKENS),
}
PARTS: dict[str, Any] = {
    "norm": bytes(4 * H),
    "inputs": bytes(4 * H * 64),
    "head norms": None,
    "input sizes": (H, Q, G, D, 0, 0, 0, 1, 0, 0),
    "input factors": (1e-5, 0.0, 2.5),
    "keys": bytearray(4 * PAGES * 16 * G * D),
    "values": bytearray(4 * PAGES * 16 * G * D),
    "key sizes": (0, 1, PAGES, G, D, OUTPUTS, D),
    "value sizes": (0, 0, PAGES, G, D, OUTPUTS, D),
    "heads": (0, 4, PAGES, G, Q, D),
    "scoring": (0.5, 0.0, 0),
    "sinks": None,
    "kernel": None,
    "output": bytes(4 * Q * D * 64),
    "next norm": bytes(4 * H),
    "output sizes": (Q * D, H, 0, 0, 0, 1),
    "epsilon": 1e-5,
}
WRONG_HALVES: dict[str, dict[str, Any]] = {
    "no token": {"slots": np.array([], np.int64)},
    "a row too few": {"residual": bytearray(4 * H * 2), "last output": None},
    "a row of the output too few": {"last output": bytes(4 * H * 2)},
    "a value of the output too many": {"last output": bytes(4 * H * TOKENS + 4)},
    "a residual stream that nobody can write": {"residual": bytes(4 * H * TOKENS)},
    "no output, and a stream that nobody can write": {
        "residual": bytes(4 * H * TOKENS),
        "last output": None,
    },
    "sums of an unknown format": {"heads": (7, 4, PAGES, G, Q, D)},
    "a slot too few": {"slots": np.array([1, 2])},
    "a slot beyond the cache": {"slots": np.array([1, 2, 16 * PAGES])},
    "a page beyond the cache": {"pages": np.array([PAGES])},
    "a span of other tokens": {"spans": np.array([[0, 2, 1, 0]])},
    "angles too few": {"angles": bytes(4 * D * 2)},
    "room for two rows": {"out": bytearray(4 * H * 2)},
    "too much room": {"out": bytearray(4 * H * TOKENS + 1)},
    "no head": {"heads": (0, 4, PAGES, 0, Q, D)},
    "heads without end": {"heads": (0, 4, PAGES, 1 << 16, 1 << 16, 1 << 16)},
    "more heads than are projected": {"heads": (0, 4, PAGES, 2 * G, 2 * Q, D)},
    "values of another size": {"heads": (0, 2, PAGES, G, Q, D)},
    "another cache": {"keys": bytearray(8)},
    "values that nobody can write": {"values": bytes(4 * PAGES * 16 * G * D)},
    "weights of another size": {"output": bytes(4)},
    "no parts": {"parts": ()},
    "parts that are none": {"parts": [None] * len(PARTS)},
}


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("wrong", [None, *WRONG_HALVES])
def test_a_half_that_does_not_fit_is_refused(native: ModuleType, wrong: str | None) -> None:
    call = {**HALF, **PARTS, **(WRONG_HALVES[wrong] if wrong else {})}
    parts = call.get("parts", tuple(call[name] for name in PARTS))
    arguments = *(call[name] for name in HALF), parts, 1
    if wrong is None:
        native.attention_half(*arguments)
        return
    with pytest.raises((ValueError, TypeError, BufferError), match=r"."):
        native.attention_half(*arguments)
