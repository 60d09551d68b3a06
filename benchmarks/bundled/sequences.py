"""The mixture ``sequences``: recurrent networks for readings of an instrument in three modes.

A reading is a sequence of steps with three channels: a signal, marks, and the noisy mode. Its
level, low, middle or high, is in each mode another part of it: the signal's last steps, the signal
at the mark, or the number of marks. A linear gate looks at the channels' means. All parts learn
together (Jacobs et al. 1991), with a small penalty on uneven use of the experts (Shazeer et al.
2017).

Dimension letters: P rows, T steps, F channels, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, log_loss

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
from benchmarks.bundled.trained import Begin, Trained, is_held_out, trained
from experts.checkpoint.mixture import Mixture
from tests.local_mixture import LocalMixture
from workshop.estimators.adaptive.estimators import AdaptiveMixtureClassifier
from workshop.estimators.adaptive.network import Cell
from workshop.estimators.parts import FittedMixture, RecurrentPart
from workshop.estimators.sequences import sequences_of

NUM_STARTS, MAX_ITER, SEED = 2, 200, 0
HIDDEN, TOP_K = 4, 2
PENALTY, BALANCE = 0.3, 0.2
CELLS: tuple[Cell, ...] = ("plain", "gru", "lstm")
SINGLES = [(cell, size) for size in (HIDDEN, 2 * HIDDEN) for cell in CELLS]
NUM_STEPS = 1 + len(SINGLES)
CHANGES: dict[str, Any] = {
    "description": "Whether readings of an instrument are low, middle or high: recurrent networks "
    "of three cells, of which a gate over the channels' means chooses two.",
    "combine": {"kind": "probabilities", "classes": LEVELS},
    "inputs": [{"name": "steps", "datatype": "FP32", "shape": [-1, len(CHANNELS)]}],
    "outputs": [
        {"name": "level", "datatype": "BYTES", "from": "label"},
        {"name": "probabilities", "datatype": "FP32", "from": "probabilities"},
        {"name": "experts", "datatype": "INT64", "from": "experts"},
        {"name": "weights", "datatype": "FP32", "from": "weights"},
    ],
}
"""Keys of ``mixture.yaml`` in the terms of the data; the fit has numbers for the levels."""
MIXTURE, FIRST_ALONE = "this mixture", "this mixture, with top_k 1"


def train(begin: Begin) -> Trained:
    """Train the mixture."""
    batches = make_batches()
    held_out = is_held_out(len(batches))
    seen = [batch for batch, is_out in zip(batches, held_out, strict=True) if not is_out]
    other = [batch for batch, is_out in zip(batches, held_out, strict=True) if is_out]
    begin(MIXTURE)
    fitted = fit(seen, len(CELLS), CELLS, HIDDEN, top_k=TOP_K, importance_weight=BALANCE)
    fitted.mixture_ = _named(fitted.mixture_, CELLS)

    def card(mixture: Mixture, local: LocalMixture) -> str:
        rows, levels = readings_of(other)
        outputs = [local.predict({"steps": batch.steps}) for batch in other]
        served = np.concatenate([output["probabilities"] for output in outputs])
        first = _by_first(fitted.mixture_).combine(sequences_of(rows))
        scores = [
            (MIXTURE, num_parameters(fitted), *_scores(served, levels)),
            (FIRST_ALONE, "the same", *_scores(first, levels)),
        ]
        for cell, size in SINGLES:
            name = f"one network, {cell}, {size} hidden values"
            begin(name)
            single = fit(seen, 1, cell, size)
            probabilities = single.predict_proba(rows)
            scores.append((name, num_parameters(single), *_scores(probabilities, levels)))
        parts = {
            "shortest": SHORTEST,
            "longest": LONGEST,
            "num_batches": len(seen),
            "num_held_out": len(other),
            "batch_rows": len(batches[0].levels),
            "hidden": HIDDEN,
            "top_k": TOP_K,
            "num_starts": NUM_STARTS,
            "max_iter": MAX_ITER,
            "scores": table(("", "Parameters", "Accuracy", "Log loss"), scores),
            "weights": _weights_by_mode(fitted, other),
        }
        shortest = min(other, key=lambda batch: batch.steps.shape[1])
        return filled("sequences", mixture, local, {"steps": shortest.steps[:1]}, parts)

    return trained(fitted, CHANGES, card)


def fit(
    batches: Sequence[Batch], num_experts: int, cell: Any, size: int, **parameters: Any
) -> AdaptiveMixtureClassifier:
    """Return recurrent experts with ``size`` hidden values, fitted to the readings."""
    mixture = AdaptiveMixtureClassifier(
        num_experts,
        experts="rnn",
        cell=cell,
        hidden_layer_sizes=(size,),
        init="random",
        n_init=NUM_STARTS,
        alpha=PENALTY,
        max_iter=MAX_ITER,
        random_state=SEED,
        **parameters,
    )
    return mixture.fit(*readings_of(batches))


def readings_of(batches: Sequence[Batch]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return all readings [T, F] and their levels [P]."""
    readings = [reading for batch in batches for reading in batch.steps]
    return readings, np.concatenate([batch.levels for batch in batches])


def num_parameters(fitted: AdaptiveMixtureClassifier) -> int:
    """Return the number of weights and biases of a mixture; a single expert has no gate."""
    gates = fitted.mixture_.gates.values() if len(fitted.mixture_.experts) > 1 else ()
    arrays = [array for gate in gates for layer in gate.layers for array in layer]
    for part in fitted.mixture_.experts.values():
        assert isinstance(part, RecurrentPart)
        arrays += part.tensors.values()
    return sum(array.size for array in arrays)


def _named(mixture: FittedMixture, names: Sequence[str]) -> FittedMixture:
    """Return a fitted mixture whose experts have these names, in their order."""
    new = dict(zip(mixture.experts, names, strict=True))
    gates = {
        name: replace(gate, choices=tuple(new[choice] for choice in gate.choices))
        for name, gate in mixture.gates.items()
    }
    return replace(
        mixture, gates=gates, experts={new[name]: part for name, part in mixture.experts.items()}
    )


def _by_first(mixture: FittedMixture) -> FittedMixture:
    """Return a mixture that gives each row to its likeliest expert alone."""
    gates = {name: replace(gate, top_k=1) for name, gate in mixture.gates.items()}
    return replace(mixture, gates=gates)


def _scores(probabilities: np.ndarray, levels: np.ndarray) -> tuple[float, float]:
    """Return accuracy and log loss."""
    probabilities = probabilities.astype(np.float64)  # float32 does not add up to 1
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    accuracy = float(accuracy_score(levels, probabilities.argmax(axis=1)))
    return accuracy, float(log_loss(levels, probabilities))


def _weights_by_mode(fitted: AdaptiveMixtureClassifier, batches: Sequence[Batch]) -> str:
    weights = fitted.responsibilities(readings_of(batches)[0])
    modes = np.concatenate([batch.modes for batch in batches])
    rows = [(name, *weights[modes == mode].mean(axis=0)) for mode, name in enumerate(MODES)]
    return table(("The level is", *(f"`{cell}`" for cell in CELLS)), rows)
