"""What calibration decides of a split layer: its parts, the gate that chooses among them, and how
the chosen ones make up for the others.

The parts are CMoE's (Pei et al. 2025, arXiv 2502.04416): the neurons with the largest outputs are
shared, and the others are grouped by the tokens that they are active for, by k-means with equal
sizes.

Dimension letters: T tokens, I neurons, H hidden size, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch.nn import functional

from cluster.errors import CheckpointError
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.compute.ffn import ACTIVATIONS
from workshop.folders.as_mixture import Sizes
from workshop.folders.layerwise import LayerExperts, Observer
from workshop.folders.passes import Missed
from workshop.folders.upcycle.upcycled import LayerSplit

_TOKENS_AT_ONCE = 2048
_DIVIDING_VALUES = 16 << 20
"""The most values by which neurons are grouped; more tokens change few groups."""
_RIDGE = 1e-3
"""Added to the diagonal of the gate's regression, as a part of its mean."""
_REFIT_RIDGE = 1e-2
"""The same for the refitted matrix."""
_MADE_UP = 0.7
"""The part of the errors of the layers before that a layer makes up for; all of it fits less well
to other text."""
_LARGEST_LOGITS = {"bfloat16": -12, "float16": -14, "float32": -17}
"""By dtype: the power of two that no logit of an exact gate exceeds in calibration.

The softmax of such logits is 1/N: in bfloat16 and float16 to the last bit, if N is a power of two,
since weights are rounded to the model's dtype after the choice, and in float32 to 1e-5. The choice
is made by the softmax in float32, which tells logits apart that differ by 2e-7.
"""
_LARGEST_OF_FEWER = -4
"""The same where a token has fewer experts than all, so that no weight need be exact."""


class SplitObserver(Observer):
    """Keeps a dense layer's inputs."""

    def __init__(
        self, checkpoint: Checkpoint, layer_id: int, sizes: Sizes, missed: Missed | None = None
    ) -> None:
        """``checkpoint`` has one expert a layer.

        ``missed`` is for experts that stand for all: it returns what the layers before lack.
        """
        self._missed = missed
        self._checkpoint = checkpoint
        self._layer_id = layer_id
        self._sizes = sizes
        self._rows: list[torch.Tensor] = []

    def chosen(self, normed: torch.Tensor, ids: np.ndarray, weights: torch.Tensor) -> None:
        """Keep the layer's inputs."""
        self._rows.append(normed.clone())

    def result(self, experts: LayerExperts) -> dict[str, np.ndarray]:
        """Return the part of each neuron [I], and the gate's rows [N, H].

        Where a token has fewer experts than all, there is another matrix ``down`` [H, I] too.
        Raises :class:`CheckpointError` where the layer's outputs are not finite.
        """
        layer = _Layer(self._checkpoint, self._layer_id, torch.cat(self._rows))
        self._rows = []
        sizes = self._sizes
        parts = divide(layer.sample(), sizes.shared_neurons, sizes.experts)
        gate = fit_gate(layer.rows, layer.outputs_of(parts, sizes.experts))
        if not gate.isfinite().all():
            raise CheckpointError(
                f"layer {self._layer_id} yields NaN or infinity on the calibration text",
                str(self._checkpoint.folder),
            )
        is_exact = self._missed is None
        gate = gate * _scale(layer.rows @ gate.T, self._checkpoint.dtype, is_exact)
        found = {"parts": parts.numpy(), "gate": gate.numpy()}
        if self._missed is not None:
            down = layer.refitted(parts, gate, sizes.active, self._missed())
            found["down"] = down.numpy()
            # The next layers are fitted to the inputs that this one will give them.
            experts.replace(lambda rows: layer.chosen(rows, parts, gate, sizes.active) @ down.T)
        return found


def layer_split(seen: Mapping[str, np.ndarray], sizes: Sizes) -> LayerSplit:
    """Return a layer's split of an observer's result."""
    parts = seen["parts"]
    neurons = [np.flatnonzero(parts == part) for part in range(-1, sizes.experts)]
    return LayerSplit(neurons[0], neurons[1:], seen["gate"], seen.get("down"))


class _Layer:
    """A dense layer in float32 and its inputs ``rows`` [T, H]."""

    def __init__(self, checkpoint: Checkpoint, layer_id: int, rows: torch.Tensor) -> None:
        self.rows = rows
        weights = load_expert(checkpoint, layer_id, 0, "float32").map(from_array)
        self._gate_up, self._down = weights.gate_up, weights.down
        self._norms = weights.down.norm(dim=0)
        self._act = ACTIVATIONS[checkpoint.shape.activation]

    def sample(self) -> torch.Tensor:
        """Return the norms of all neurons' outputs for some tokens, spread evenly."""
        num_tokens = max(1, _DIVIDING_VALUES // len(self._norms))
        step = math.ceil(len(self.rows) / num_tokens)
        return self._outputs(self.rows[::step])

    def outputs_of(self, parts: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Return the root of each expert's summed squares of its neurons' outputs [T, N]."""
        members = functional.one_hot(parts + 1, num_experts + 1)[:, 1:].float()
        return torch.cat([(outputs.square() @ members).sqrt() for outputs in self._all()])

    def refitted(
        self, parts: torch.Tensor, gate: torch.Tensor, active: int, missed: torch.Tensor
    ) -> torch.Tensor:
        """Return the matrix ``down`` [H, I] with which the chosen parts come nearest to all.

        ``gate`` [N, H] chooses ``active`` experts. They also make up for :data:`_MADE_UP` of
        ``missed`` [T, H]. The least squares are over the layer's inputs, and a ridge holds the
        matrix near the dense one.
        """
        products = torch.zeros(len(parts), len(parts))
        missing = torch.zeros(len(parts), self.rows.shape[1])
        blocks = self.rows.split(_TOKENS_AT_ONCE), missed.split(_TOKENS_AT_ONCE)
        for rows, lacked in zip(*blocks, strict=True):
            values = self._values(rows)
            chosen = values * _shares(rows, parts, gate, active)
            products.addmm_(chosen.T, chosen)
            wanted = (values - chosen) @ self._down.T + _MADE_UP * lacked
            missing.addmm_(chosen.T, wanted)
        products.diagonal().add_(_REFIT_RIDGE * products.diagonal().mean())
        return self._down + torch.linalg.solve(products, missing).T

    def chosen(
        self, rows: torch.Tensor, parts: torch.Tensor, gate: torch.Tensor, active: int
    ) -> torch.Tensor:
        """Return the neurons' values [T, I], those of experts times their weights."""
        return self._values(rows) * _shares(rows, parts, gate, active)

    def _all(self) -> Iterator[torch.Tensor]:
        for some in self.rows.split(_TOKENS_AT_ONCE):
            yield self._outputs(some)

    def _outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the norms of what each neuron adds to rows [T, H]: [T, I]."""
        return self._values(rows).abs() * self._norms

    def _values(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the neurons' values [T, I] for rows [T, H]."""
        gate, up = functional.linear(rows, self._gate_up).chunk(2, dim=-1)
        return self._act(gate) * up


def _shares(
    rows: torch.Tensor, parts: torch.Tensor, gate: torch.Tensor, active: int
) -> torch.Tensor:
    """Return by what each neuron's value counts for each of ``rows`` [T, H]: [T, I].

    It is 1 in the shared part, and 0 in experts that were not chosen.
    """
    weights, ids = (rows @ gate.T).softmax(-1).topk(active, -1)
    shares = torch.zeros(len(rows), len(gate) + 1).scatter_(1, ids + 1, weights * len(gate))
    shares[:, 0] = 1.0
    return shares[:, parts + 1]


def fit_gate(rows: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Return the gate's rows [N, H] that predict ``outputs`` [T, N] of ``rows`` [T, H] best.

    It is a ridge regression: CMoE's gate, the activation of a neuron that stands for its expert, is
    no linear map, which Qwen2-MoE's gate is.
    """
    rows = rows.double()
    products = rows.T @ rows
    products += _RIDGE * products.diagonal().mean() * torch.eye(len(products))
    return torch.linalg.solve(products, rows.T @ outputs.double()).T.float()


def _scale(logits: torch.Tensor, dtype: str, is_exact: bool) -> float:
    """Return the power of two by which a gate's logits become as small as they must be."""
    largest = float(logits.abs().max())
    if largest == 0:
        return 1.0
    wanted = _LARGEST_LOGITS[dtype] if is_exact else _LARGEST_OF_FEWER
    return 2.0 ** (wanted - math.ceil(math.log2(largest)))


ROUNDS = 8
"""Rounds of k-means; later ones move few neurons."""


def divide(outputs: torch.Tensor, num_shared: int, num_experts: int) -> torch.Tensor:
    """Return the part of each neuron: -1 for the shared one, else an expert; int64 [I].

    ``outputs`` [T, I] are the norms of what the neurons add for some tokens. ``num_shared`` neurons
    are shared, those with the largest mean square. The number of the others is a multiple of
    ``num_experts``.
    """
    order = outputs.square().mean(0).argsort(descending=True, stable=True)
    routed = order[num_shared:]
    parts = torch.full((outputs.shape[1],), -1, dtype=torch.int64)
    parts[routed] = _groups(_profiles(outputs[:, routed]), num_experts)
    return parts


def _profiles(outputs: torch.Tensor) -> torch.Tensor:
    """Return a unit vector of each neuron [T, I], whose products are correlations.

    The roots of outputs keep the largest few from deciding all.
    """
    roots = outputs.sqrt()
    return torch.nn.functional.normalize(roots - roots.mean(0), dim=0)


def _groups(profiles: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the group of each column of ``profiles`` [T, I]; groups have equal sizes."""
    # The first columns are the most active neurons, as CMoE's first centres are.
    centres = profiles[:, :num_groups].clone()
    for _ in range(ROUNDS):
        groups = _assigned((profiles.T @ centres).numpy(), profiles.shape[1] // num_groups)
        means = torch.stack([profiles[:, groups == n].mean(1) for n in range(num_groups)], dim=1)
        centres = torch.nn.functional.normalize(means, dim=0)
    return groups


def _assigned(likeness: np.ndarray, size: int) -> torch.Tensor:
    """Return groups of ``size`` rows of ``likeness`` [I, N], the likest pairs first."""
    num_rows, num_groups = likeness.shape
    groups = np.full(num_rows, -1)
    room = np.full(num_groups, size)
    for pair in np.argsort(-likeness, axis=None, kind="stable").tolist():
        row, group = divmod(pair, num_groups)
        if groups[row] < 0 and room[group]:
            groups[row] = group
            room[group] -= 1
    return torch.from_numpy(groups)
