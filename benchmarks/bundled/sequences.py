"""The mixture ``sequences``: recurrent networks for readings of an instrument in three modes.

A reading is a sequence of steps with three channels: a signal, marks, and the noisy mode. Its
level, low, middle or high, is in each mode another part of it: the signal's last steps, the signal
at the mark, or the number of marks. A linear gate looks at the channels' means. All parts learn
together by gradient descent (Jacobs et al. 1991), with a small penalty on uneven use of the experts
(Shazeer et al. 2017).

Dimension letters: P rows, T steps, F channels, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.bundled.card import filled, table
from benchmarks.bundled.readings import (
    CHANNELS,
    LEVELS,
    LONGEST,
    MODES,
    SHORTEST,
    Batch,
    make_batches,
)
from benchmarks.bundled.trained import Begin, Trained, is_held_out
from benchmarks.local_mixture import LocalMixture
from experts.checkpoint.mixture import Mixture
from router.workshop.mixture.weights import tensor_bytes

NUM_STARTS, NUM_EPOCHS = 6, 40
HIDDEN, TOP_K = 4, 2
LEARNING_RATE, LONGEST_GRADIENT, BALANCE = 0.01, 1.0, 0.01
LEAST_USE = 0.1
"""The least share of the readings for which an expert must be the first choice."""
CELLS: Mapping[str, Callable[..., nn.RNNBase]] = {"plain": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
SINGLES = [(cell, size) for size in (HIDDEN, 2 * HIDDEN) for cell in CELLS]
NUM_STEPS = NUM_STARTS * (1 + len(SINGLES))
MIXTURE, FIRST_ALONE = "this mixture", "this mixture, with top_k 1"


class Network(nn.Module):
    """A recurrent network and a head, as an expert of kind ``rnn`` has them."""

    def __init__(self, cell: str, size: int) -> None:
        super().__init__()
        self.rnn = CELLS[cell](len(CHANNELS), size, batch_first=True)
        self.head = nn.Linear(size, len(LEVELS))

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """Return log probabilities [P, C] of readings [P, T, F]."""
        outputs: torch.Tensor = self.head(self.rnn(steps)[0][:, -1])
        return outputs.log_softmax(dim=1)


class Networks(nn.Module):
    """A network of each cell, and the gate, with all experts computed."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({cell: Network(cell, HIDDEN) for cell in CELLS})
        self.gate = nn.Linear(len(CHANNELS), len(CELLS))

    def weights(self, steps: torch.Tensor) -> torch.Tensor:
        """Return the gate's weights [P, E]."""
        scores: torch.Tensor = self.gate(steps.mean(dim=1))
        return scores.softmax(dim=1)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """Return log probabilities [P, C]."""
        logs = torch.stack([expert(steps) for expert in self.experts.values()], dim=1)
        return (self.weights(steps).log()[:, :, None] + logs).logsumexp(dim=1)

    def unevenness(self, steps: torch.Tensor) -> torch.Tensor:
        """Return the squared coefficient of variation of the experts' total weights."""
        totals = self.weights(steps).sum(dim=0)
        return totals.var() / totals.mean() ** 2


def train(begin: Begin) -> Trained:
    """Train the mixture."""
    batches = make_batches()
    held_out = is_held_out(len(batches))
    seen = [batch for batch, is_out in zip(batches, held_out, strict=True) if not is_out]
    other = [batch for batch, is_out in zip(batches, held_out, strict=True) if is_out]
    networks = best_start(Networks, seen, MIXTURE, begin)
    tensors = {f"{key.removeprefix('experts.')}": t for key, t in networks.state_dict().items()}
    gate = {key: t.numpy() for key, t in tensors.items() if key.startswith("gate.")}
    experts = {key: t.numpy() for key, t in tensors.items() if not key.startswith("gate.")}
    files = {
        "gate.safetensors": tensor_bytes(gate, "float32"),
        "experts.safetensors": tensor_bytes(experts, "float32"),
    }

    def card(mixture: Mixture, local: LocalMixture) -> str:
        outputs = [local.predict({"steps": batch.steps}) for batch in other]
        rows = [
            (MIXTURE, num_parameters(networks), *_scores(other, outputs)),
            (FIRST_ALONE, "the same", *_scores(other, [_by_first(networks, b) for b in other])),
        ]
        for cell, size in SINGLES:
            name = f"one network, {cell}, {size} hidden values"

            def network(cell: str = cell, size: int = size) -> Network:
                return Network(cell, size)

            single = best_start(network, seen, name, begin)
            answers = [{"probabilities": _probabilities(single, batch)} for batch in other]
            rows.append((name, num_parameters(single), *_scores(other, answers)))
        parts = {
            "shortest": SHORTEST,
            "longest": LONGEST,
            "num_batches": len(seen),
            "num_held_out": len(other),
            "batch_rows": len(batches[0].levels),
            "hidden": HIDDEN,
            "top_k": TOP_K,
            "num_starts": NUM_STARTS,
            "num_epochs": NUM_EPOCHS,
            "least_use": LEAST_USE,
            "scores": table(("", "Parameters", "Accuracy", "Log loss"), rows),
            "weights": _weights_by_mode(networks, other),
        }
        shortest = min(other, key=lambda batch: batch.steps.shape[1])
        return filled("sequences", mixture, local, {"steps": shortest.steps[:1]}, parts)

    return Trained(_spec(), files, card)


def best_start(
    make: Callable[[], nn.Module], batches: Sequence[Batch], name: str, begin: Begin
) -> Any:
    """Train from several starts; returns the module with the least loss on the same batches.

    A mixture with an expert that is hardly used does not count. Raises ``RuntimeError`` when no
    start counts.
    """
    found = []
    for seed in range(NUM_STARTS):
        begin(f"{name}, start {seed + 1} of {NUM_STARTS}")
        torch.manual_seed(seed)
        module = make()
        _descend(module, batches, seed)
        if not isinstance(module, Networks) or _least_use(module, batches) >= LEAST_USE:
            answers = [{"probabilities": _probabilities(module, batch)} for batch in batches]
            found.append((_scores(batches, answers)[1], seed, module))
    if not found:
        raise RuntimeError(f"each start of {name} leaves an expert unused")
    return min(found)[2]


@torch.no_grad()
def _least_use(networks: Networks, batches: Sequence[Batch]) -> float:
    """Return the smallest share of the readings for which an expert is the first choice."""
    weights = torch.cat([networks.weights(torch.from_numpy(batch.steps)) for batch in batches])
    counts = weights.argmax(dim=1).bincount(minlength=len(CELLS))
    return float(counts.min() / counts.sum())


def _descend(module: nn.Module, batches: Sequence[Batch], seed: int) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_EPOCHS)
    rng = np.random.default_rng(seed)
    for _ in range(NUM_EPOCHS):
        for place in rng.permutation(len(batches)):
            steps = torch.from_numpy(batches[place].steps)
            loss = functional.nll_loss(module(steps), torch.from_numpy(batches[place].levels))
            if isinstance(module, Networks):
                loss = loss + BALANCE * module.unevenness(steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), LONGEST_GRADIENT)
            optimizer.step()
        schedule.step()


@torch.no_grad()
def _probabilities(module: nn.Module, batch: Batch) -> np.ndarray:
    probabilities: np.ndarray = module(torch.from_numpy(batch.steps)).exp().numpy()
    return probabilities


@torch.no_grad()
def _by_first(networks: Networks, batch: Batch) -> dict[str, np.ndarray]:
    """Return the probabilities of each row's likeliest expert alone."""
    steps = torch.from_numpy(batch.steps)
    logs = torch.stack([expert(steps) for expert in networks.experts.values()], dim=1)
    first = networks.weights(steps).argmax(dim=1)
    return {"probabilities": logs[torch.arange(len(first)), first].exp().numpy()}


def _scores(
    batches: Sequence[Batch], answers: Sequence[Mapping[str, np.ndarray]]
) -> tuple[float, float]:
    """Return accuracy and log loss of the answers' probabilities."""
    probabilities = np.concatenate([answer["probabilities"] for answer in answers]).astype(float)
    levels = np.concatenate([batch.levels for batch in batches])
    accuracy = float((probabilities.argmax(axis=1) == levels).mean())
    return accuracy, float(-np.log(probabilities[np.arange(len(levels)), levels]).mean())


@torch.no_grad()
def _weights_by_mode(networks: Networks, batches: Sequence[Batch]) -> str:
    weights = np.concatenate(
        [networks.weights(torch.from_numpy(batch.steps)).numpy() for batch in batches]
    )
    modes = np.concatenate([batch.modes for batch in batches])
    rows = [(name, *weights[modes == mode].mean(axis=0)) for mode, name in enumerate(MODES)]
    return table(("The level is", *(f"`{cell}`" for cell in CELLS)), rows)


def num_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _spec() -> dict[str, Any]:
    return {
        "format": 1,
        "description": "Whether readings of an instrument are low, middle or high: recurrent "
        "networks of three cells, of which a gate over the channels' means chooses two.",
        "dtype": "float64",  # float32 would let the last digits differ from torch's
        "inputs": [{"name": "steps", "datatype": "FP32", "shape": [-1, len(CHANNELS)]}],
        "gate": "mode",
        "gates": {
            "mode": {
                "kind": "linear",
                "file": "gate.safetensors",
                "prefix": "gate.",
                "pool": "mean",
                "top_k": TOP_K,
                "choices": list(CELLS),
            }
        },
        "experts": {
            cell: {
                "kind": "rnn",
                "cell": cell,
                "file": "experts.safetensors",
                "prefix": f"{cell}.",
                "link": "softmax",
            }
            for cell in CELLS
        },
        "combine": {"kind": "probabilities", "classes": list(LEVELS)},
        "outputs": [
            {"name": "level", "datatype": "BYTES", "from": "label"},
            {"name": "probabilities", "datatype": "FP32", "from": "probabilities"},
            {"name": "experts", "datatype": "INT64", "from": "experts"},
            {"name": "weights", "datatype": "FP32", "from": "weights"},
        ],
    }
