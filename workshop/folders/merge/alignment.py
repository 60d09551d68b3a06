"""Which neuron of an expert is which neuron of another one.

An expert's output does not depend on the order of its neurons. Before experts are averaged, the
neurons of each are brought into the order of a reference, by the assignment with the largest sum of
inner products (Li et al. 2023, "Merge, Then Compress", arXiv 2310.01334).

Dimension letters: I neurons, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

DOWN, DOWN_BIAS = 2, 5
"""The indices in ``ExpertTensors.parts()`` of the parts whose rows are no neurons."""


def neuron_orders(
    reference: Sequence[torch.Tensor], experts: Iterable[Sequence[torch.Tensor]], at_once: int
) -> list[torch.Tensor]:
    """Return the order [I] in which each expert's neurons are most like the reference's.

    An expert is its matrices and biases in the order of ``ExpertTensors.parts()``, of any floating
    dtype. ``at_once`` assignments are under way together, each with a matrix [I, I] in float64.
    Raises ``ValueError`` for numbers that are not finite.
    """
    found: list[Future[torch.Tensor]] = []
    with ThreadPoolExecutor(at_once, "assignment") as pool:  # scipy's keeps no other thread out
        for number, parts in enumerate(experts):
            products = _products(reference, parts)
            if number >= at_once:
                found[number - at_once].result()  # it has given back its matrix
            found.append(pool.submit(_assigned, products.double().neg_()))
            del products
        return [future.result() for future in found]


def assignment_bytes(num_neurons: int) -> int:
    """Return the bytes that an assignment under way takes."""
    return num_neurons * num_neurons * 8


def _assigned(costs: torch.Tensor) -> torch.Tensor:
    _, order = linear_sum_assignment(costs.numpy())
    return torch.from_numpy(order)


def _products(reference: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the inner products [I, I] of two experts' neurons, in float32.

    Where all numbers are bfloat16's, torch may multiply them as such: such a product is a float32
    number. The sums are float32's.
    """
    num_neurons = len(reference[0])
    products = torch.zeros(num_neurons, num_neurons)
    are_bfloat16 = all(part.dtype == torch.bfloat16 for part in (*reference, *parts))
    with _bfloat16_multiplied() if are_bfloat16 else nullcontext():
        for index, (one, other) in enumerate(zip(reference, parts, strict=True)):
            if index == DOWN:
                products.addmm_(one.float().T, other.float())
            elif index != DOWN_BIAS:
                left, right = (part.float().reshape(num_neurons, -1) for part in (one, other))
                products.addmm_(left, right.T)
    return products


@contextmanager
def _bfloat16_multiplied() -> Iterator[None]:
    """Let torch multiply float32 matrices as bfloat16, with sums in float32."""
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if products is None:  # an old torch
        yield
        return
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def in_order(part: torch.Tensor, index: int, order: torch.Tensor) -> torch.Tensor:
    """Return a part of an expert with its neurons in this order."""
    if index == DOWN_BIAS:
        return part
    return part[:, order] if index == DOWN else part[order]
