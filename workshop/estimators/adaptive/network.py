"""The networks of an adaptive mixture while they are fitted: a gate, experts, their deviations.

Every row goes through every expert. With a noisy gate the weights of experts that are not chosen
are 0 (:mod:`workshop.estimators.adaptive.noisy_gate`); without noise all weights are positive,
and ``top_k`` prunes at prediction only.

All tensors are float64. Dimension letters: N rows, E experts, F inputs of a layer, T steps of a
sequence, H hidden values, W outputs, S steps of all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from workshop.estimators.adaptive.noisy_gate import (
    chosen_probabilities,
    keep_top_k,
    noisy_scores,
)
from workshop.estimators.sequences import Sequences


@dataclass(frozen=True)
class PackedRows:
    """Rows of several lengths, packed step by step: no network computes beyond a row's end."""

    sequences: Sequences

    def __len__(self) -> int:
        """Return N."""
        return len(self.sequences)

    def __getitem__(self, places: Tensor) -> PackedRows:
        """Return the rows at some places."""
        return PackedRows(self.sequences[places.numpy()])

    @cached_property
    def packed(self) -> PackedSequence:
        """The steps [S, F] by their place in the row, in each place the longest rows first."""
        values, starts = torch.from_numpy(self.sequences.values), self.sequences.starts
        rows = values.tensor_split(torch.from_numpy(starts[1:]))
        return pack_sequence(list(rows), enforce_sorted=False)

    @cached_property
    def means(self) -> Tensor:
        """The mean [N, F] of each row's steps."""
        sums = np.add.reduceat(self.sequences.values, self.sequences.starts)
        return torch.from_numpy(sums / self.sequences.lengths[:, None])

    @cached_property
    def lasts(self) -> Tensor:
        """The last step [N, F] of each row."""
        ends = self.sequences.starts + self.sequences.lengths - 1
        return torch.from_numpy(self.sequences.values[ends])


Cell = Literal["plain", "gru", "lstm"]
RowsTensor = Tensor | PackedRows
"""Rows [N, F], sequences [N, T, F], or sequences of several lengths."""
MIN_VARIANCE = 1e-6
"""The least fitted variance, in units of the targets' own: without it the likelihood of targets
that an expert meets exactly has no bound."""
_MODULES: Mapping[Cell, Callable[..., nn.RNNBase]] = {
    "plain": nn.RNN,
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class Architecture:
    """The sizes and kinds of the networks.

    ``gate_inputs`` is the number of values that the gate sees of a row, ``num_inputs`` that of an
    expert's inputs (at each step, if it is recurrent), ``width`` is W. ``cells`` are those of
    recurrent experts, one for each. ``deviation`` says whether
    one deviation is fitted for all experts, or one for each. ``top_k`` is the number of experts
    that a noisy gate chooses.
    """

    num_experts: int
    gate_inputs: int
    num_inputs: int
    width: int
    experts: Literal["linear", "mlp", "rnn"] = "linear"
    hidden_sizes: tuple[int, ...] = ()
    gate_hidden_sizes: tuple[int, ...] = ()
    activation: Literal["tanh", "relu"] = "tanh"
    cells: tuple[Cell, ...] = ()
    pool: Literal["flatten", "mean", "last"] = "flatten"
    deviation: Literal["shared", "expert", "none"] = "none"
    top_k: int = 0
    is_noisy: bool = False


class StackedLayers(nn.Module):
    """Layers of ``copies`` networks that are alike: weights [E, out, F] and biases [E, out]."""

    def __init__(self, copies: int, sizes: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self._act = ACTIVATIONS[activation]
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList(_zeros(copies, out, inputs) for inputs, out in pairs)
        self.biases = nn.ParameterList(_zeros(copies, out) for _, out in pairs)
        # A fit asks for them thousands of times, and a ParameterList is slow.
        *self._hidden, self._last = zip(self.weights, self.biases, strict=True)

    def features(self, x: Tensor) -> Tensor:
        """Return the values [E, N, H] before the last layer, of ``x`` [N, F] or [E, N, F]."""
        hidden = x.expand(len(self._last[0]), *x.shape[-2:])
        for weight, bias in self._hidden:
            hidden = self._act(torch.baddbmm(bias[:, None], hidden, weight.transpose(1, 2)))
        return hidden

    def head(self, features: Tensor) -> Tensor:
        """Return the last layer's values [E, N, out]."""
        weight, bias = self._last
        return torch.baddbmm(bias[:, None], features, weight.transpose(1, 2))


class RecurrentLayers(nn.Module):
    """E recurrent networks over rows [N, T, F]; the head takes the last step's hidden values."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        sizes = architecture.hidden_sizes
        with torch.random.fork_rng(devices=[]):  # torch draws weights, which are drawn anew later
            self.cells = nn.ModuleList(
                _MODULES[cell](
                    architecture.num_inputs,
                    sizes[0],
                    num_layers=len(sizes),
                    batch_first=True,
                    dtype=torch.float64,
                )
                for cell in architecture.cells
            )
        self.output = StackedLayers(
            architecture.num_experts, (sizes[-1], architecture.width), architecture.activation
        )

    def features(self, x: RowsTensor) -> Tensor:
        """Return the hidden values [E, N, H] of the last step."""
        if isinstance(x, Tensor):
            return torch.stack([cell(x)[0][:, -1] for cell in self.cells])
        states = (cell(x.packed)[1] for cell in self.cells)
        return torch.stack(
            [(state[0] if isinstance(state, tuple) else state)[-1] for state in states]
        )

    def head(self, features: Tensor) -> Tensor:
        """Return the last layer's values [E, N, W]."""
        return self.output.head(features)


class AdaptiveNetwork(nn.Module):
    """A gate, E experts of one kind, and the logarithms of their deviations where fitted."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        gate_outputs = a.num_experts * (2 if a.is_noisy else 1)
        self.gate = StackedLayers(
            1, (a.gate_inputs, *a.gate_hidden_sizes, gate_outputs), a.activation
        )
        sizes = (a.num_inputs, *(a.hidden_sizes if a.experts == "mlp" else ()), a.width)
        self.experts: StackedLayers | RecurrentLayers = (
            RecurrentLayers(a)
            if a.experts == "rnn"
            else StackedLayers(a.num_experts, sizes, a.activation)
        )
        if a.deviation != "none":
            copies = a.num_experts if a.deviation == "expert" else 1
            self.log_deviations = _zeros(copies, 1)

    def draw(self, random: np.random.RandomState) -> None:
        """Draw every weight and bias uniformly within ± 1/sqrt(inputs of its layer)."""
        for weights, biases in self._layers():
            bound = 1 / math.sqrt(weights.shape[-1])
            for parameter in (weights, *biases):
                values = random.uniform(-bound, bound, tuple(parameter.shape))
                parameter.data.copy_(torch.from_numpy(values))
        if self.architecture.is_noisy:  # noise begins with the deviation log 2, whatever the row
            self.gate.weights[-1].data[:, self.architecture.num_experts :] = 0
            self.gate.biases[-1].data[:, self.architecture.num_experts :] = 0

    @property
    def last_layers(self) -> StackedLayers:
        """The layers whose last one makes the experts' outputs."""
        experts = self.experts
        return experts.output if isinstance(experts, RecurrentLayers) else experts

    def features(self, x: RowsTensor) -> Tensor:
        """Return the experts' values [E, N, H] before the last layer."""
        if isinstance(self.experts, RecurrentLayers):
            return self.experts.features(x)
        assert isinstance(x, Tensor)
        return self.experts.features(x)

    def outputs(self, x: RowsTensor) -> Tensor:
        """Return the experts' outputs [N, E, W]."""
        return self.experts.head(self.features(x)).transpose(0, 1)

    def pooled(self, x: RowsTensor) -> Tensor:
        """Return the vectors [N, F] that the gate sees."""
        pool = self.architecture.pool
        if isinstance(x, PackedRows):
            return x.lasts if pool == "last" else x.means
        if x.ndim == 2 or pool == "flatten":
            return x.flatten(1)
        return x[:, -1] if pool == "last" else x.mean(dim=1)

    def scores(self, x: RowsTensor) -> tuple[Tensor, Tensor | None]:
        """Return the gate's scores [N, E], and the raw deviations [N, E] of a noisy gate."""
        values = self.gate.head(self.gate.features(self.pooled(x)))[0]
        if not self.architecture.is_noisy:
            return values, None
        scores, raw_deviations = values.chunk(2, dim=1)
        return scores, raw_deviations

    def log_gates(self, x: RowsTensor, top_k: int | None) -> Tensor:
        """Return the logarithms [N, E] of the weights without noise, as they are served."""
        scores, _ = self.scores(x)
        return (scores if top_k is None else keep_top_k(scores, top_k)).log_softmax(dim=1)

    def noisy_log_gates(
        self, x: RowsTensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logarithms [N, E] of the noisy gate's weights.

        The second tensor [N, E] has the probabilities that experts are chosen; it is ``None`` where
        all are.
        """
        a = self.architecture
        scores, raw_deviations = self.scores(x)
        assert raw_deviations is not None
        noisy = noisy_scores(scores, raw_deviations, generator)
        log_gates = keep_top_k(noisy, a.top_k).log_softmax(dim=1)
        if a.top_k == a.num_experts:
            return log_gates, None
        return log_gates, chosen_probabilities(scores, softplus(raw_deviations), noisy, a.top_k)

    def deviations(self) -> Tensor:
        """Return the fitted deviations [E, W], in units of standardised targets."""
        variances = (2 * self.log_deviations).exp() + MIN_VARIANCE
        return variances.sqrt().expand(self.architecture.num_experts, self.architecture.width)

    def decayed(self) -> list[Tensor]:
        """Return the weights that the penalty concerns: all but biases and deviations."""
        return [weights for weights, _ in self._layers()]

    def _layers(self) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Return the weights of each layer with its biases."""
        found: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        if isinstance(self.experts, RecurrentLayers):
            for cell in self.experts.cells:
                assert isinstance(cell, nn.RNNBase)
                for entry, recurrent, entry_bias, recurrent_bias in cell.all_weights:
                    found += [(entry, (entry_bias,)), (recurrent, (recurrent_bias,))]
        for stack in (self.gate, self.last_layers):
            found += [(w, (b,)) for w, b in zip(stack.weights, stack.biases, strict=True)]
        return found


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))
