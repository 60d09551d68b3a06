"""Which experts of a layer are alike, and which neuron of one is which neuron of another.

Experts are alike by what the gate makes of tokens, or by their outputs. An expert's output does not
depend on the order of its neurons: before experts are averaged, the neurons of each are brought
into the order of a reference, by the assignment with the largest sum of inner products (Li et al.
2023, "Merge, Then Compress", arXiv 2310.01334).

Dimension letters: T tokens, S sampled tokens, E experts, N groups of experts, H hidden size, I
neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from cluster.errors import ConfigError
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import read_tensor
from workshop.folders.layerwise import LayerExperts
from workshop.folders.options import Alike
from workshop.folders.passes import block_bytes
from workshop.folders.prune.command import UseObserver
from workshop.folders.rewritten import gate_tensors

SAMPLED_TOKENS, SAMPLE_BLOCKS = 256, 2
"""The most tokens for which outputs are compared. The outputs of all experts for them take no more
bytes than so many blocks of a pass, but at least a token's."""
_CORRECTION = "e_score_correction_bias"


class LikenessObserver(UseObserver):
    """Counts use, and compares all experts of a layer."""

    def __init__(self, checkpoint: Checkpoint, layer_id: int, by: Alike) -> None:
        shape = checkpoint.shape
        super().__init__(shape.num_experts)
        self._gate = _gate_of(checkpoint, layer_id) if by == "routing" else None
        self._products = torch.zeros(shape.num_experts, shape.num_experts, dtype=torch.float64)
        sample_bytes = SAMPLE_BLOCKS * block_bytes(checkpoint)
        token_bytes = shape.num_experts * shape.hidden_size * 4
        self._num_wanted = max(1, min(SAMPLED_TOKENS, sample_bytes // token_bytes))
        self._sample: list[torch.Tensor] = []

    def chosen(self, normed: torch.Tensor, ids: np.ndarray, weights: torch.Tensor) -> None:
        """Take what is compared too: the gate's logits, or a sample of the inputs."""
        super().chosen(normed, ids, weights)
        if self._gate is not None:
            logits = functional.linear(normed, *self._gate).double()
            self._products += logits.T @ logits
        elif self._num_wanted > 0:
            self._sample.append(normed[: self._num_wanted].clone())
            self._num_wanted -= len(self._sample[-1])

    def result(self, experts: LayerExperts) -> dict[str, np.ndarray]:
        """Return what :class:`UseObserver` does, and ``likeness`` [E, E], at most 1.

        By routing it is the cosine of two experts' logits over all tokens (M-SMoE, arXiv
        2310.01334). By output it is the mean cosine of their outputs for the same tokens.
        """
        products = self._products if self._gate is not None else self._of_outputs(experts)
        lengths = products.diagonal().sqrt().clamp(min=1e-12)
        likeness = products / lengths / lengths.unsqueeze(1)
        return super().result(experts) | {"likeness": likeness.numpy()}

    def _of_outputs(self, experts: LayerExperts) -> torch.Tensor:
        rows = torch.cat(self._sample)
        outputs = torch.empty(experts.num_experts, *rows.shape)  # [E, S, H]
        for expert_id, place in enumerate(outputs):
            place.copy_(functional.normalize(experts.compute(expert_id, rows), dim=1))
        flat = outputs.flatten(1)
        return (flat @ flat.T).double()


def _gate_of(checkpoint: Checkpoint, layer_id: int) -> list[torch.Tensor]:
    """Return the matrix of a layer's gate, and its bias if it has one that is in the logits."""
    names = [name for name in gate_tensors(checkpoint, layer_id) if _CORRECTION not in name]
    tensors = [from_array(read_tensor(checkpoint, name, "float32")).float() for name in names]
    return sorted(tensors, key=lambda tensor: -tensor.dim())


def grouped(likeness: np.ndarray, count: int, num_gate_groups: int) -> list[list[int]]:
    """Return ``count`` groups of experts [E], each ascending, in the order of their first ids.

    The two groups with the largest mean likeness are joined again and again (average linkage).
    Groups of the gate stay apart and get equally many. Raises ``ConfigError`` where ``count`` is no
    multiple of them.
    """
    if count % num_gate_groups:
        raise ConfigError(
            f"must be a multiple of the gate's {num_gate_groups} groups of experts "
            f"(given: {count})",
            "--experts",
        )
    size = len(likeness) // num_gate_groups
    groups = []
    for begin in range(0, len(likeness), size):
        part = likeness[begin : begin + size, begin : begin + size]
        joined = _joined(part, count // num_gate_groups)
        groups += [[begin + member for member in members] for members in joined]
    return groups


def _joined(likeness: np.ndarray, count: int) -> list[list[int]]:
    members = [[expert_id] for expert_id in range(len(likeness))]
    sums = likeness.copy()
    while len(members) > count:
        sizes = np.array([len(group) for group in members])
        means = sums / np.outer(sizes, sizes)
        means[np.tril_indices(len(means))] = -np.inf
        one, other = divmod(int(means.argmax()), len(means))
        sums[one] += sums[other]
        sums[:, one] += sums[:, other]
        sums = np.delete(np.delete(sums, other, 0), other, 1)
        members[one] = sorted(members[one] + members.pop(other))
    return members


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
