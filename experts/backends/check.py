"""Checking a mixture whole, before anything starts: every file is read, every expert tried.

Letters: P rows, T steps of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from cluster.errors import CheckpointError, ExpertFailedError
from experts.backends.load import MixtureExpert, load_mixture_expert
from experts.backends.tensors import PartTensors
from experts.checkpoint.mixture import Mixture
from experts.mixture.parts import (
    DensityCombine,
    Gate,
    LinearGate,
    MlpGate,
    ProbabilitiesCombine,
    ScoringGate,
)

TRIED_ROWS = (1, 2, 3)
TRIED_STEPS = (1, 3)
"""The lengths T that are tried where the length of a row may differ."""
_TRIED_VALUES = ((1.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
"""The values of three rows. An expert must take one of these triples: an encoder may not know
every value, and a logarithm is not finite at 0."""
_SUM_TOLERANCE = 1e-4
"""How far a sum of probabilities may be from 1; float32 outputs of many classes are rounded."""
_ROW_TOLERANCE = 1e-3
"""How far a row's result may be from that of the row alone, relative to the largest value."""


def check_mixture(mixture: Mixture) -> list[int]:
    """Check the tensors of all gates, and try every expert; returns each expert's resident bytes.

    Experts are loaded one after the other, and each is tried with 1, 2 and 3 rows. Raises
    :class:`CheckpointError`, whose field has file and key: for a damaged, forbidden or misfitting
    file, for an expert that raises an error, for outputs of a wrong shape or that are not finite,
    for probabilities that are negative or do not add up to 1, for deviations that are not positive,
    and for a row's result that depends on other rows.
    """
    for name, gate in mixture.spec.gates.items():
        if isinstance(gate, ScoringGate):
            _check_gate(mixture, f"gates.{name}", gate)
    return [_tried(mixture, expert_id) for expert_id in range(len(mixture.spec.experts))]


def num_gate_inputs(mixture: Mixture, gate: Gate) -> int:
    """Return the number of values that a gate's first layer takes."""
    shape = mixture.spec.gate_input(gate).shape
    pooled = isinstance(gate, ScoringGate) and gate.pool != "flatten"
    return shape[-1] if pooled else math.prod(shape)


def _check_gate(mixture: Mixture, key: str, gate: LinearGate | MlpGate) -> None:
    tensors = PartTensors(mixture, key, gate)
    num_inputs, num_choices = num_gate_inputs(mixture, gate), len(gate.choices)
    if isinstance(gate, LinearGate):
        tensors.linear(num_inputs, num_choices)
    else:
        tensors.layers(num_inputs, num_choices)
    tensors.finish()


def _tried(mixture: Mixture, expert_id: int) -> int:
    """Load and try one expert; returns its resident bytes."""
    expert = load_mixture_expert(mixture, expert_id)
    spec = mixture.spec
    where = f"{mixture.folder / spec.experts[expert.name].file}: experts.{expert.name}"
    errors: list[str] = []
    for values in _TRIED_VALUES:
        error = _error_of(expert, mixture, values, where)
        if error is None:
            return expert.num_bytes
        errors.append(error)
    raise CheckpointError(errors[0], where)


def _error_of(
    expert: MixtureExpert, mixture: Mixture, values: tuple[float, ...], where: str
) -> str | None:
    """Return the first failure of an expert for rows of these values; ``None`` without one.

    Raises :class:`CheckpointError` for a row's result that depends on other rows, which no other
    values excuse.
    """
    for row_shape in _tried_shapes(expert.row_shape):
        rows = np.empty((len(values), *row_shape), expert.dtype)
        for row, value in zip(rows, values, strict=True):
            row.fill(value)
        alone = None
        for count in TRIED_ROWS:
            given = f"for {count} rows of shape {list(row_shape)}"
            try:
                outputs = expert(rows[:count])
            except ExpertFailedError as error:
                return f"it fails {given}: {error.message}"
            wrong = _wrong_values(outputs, mixture)
            if wrong is not None:
                return f"it returns {wrong} {given}"
            alone = outputs[0] if alone is None else alone
            if not _is_close(outputs[0], alone):
                raise CheckpointError(
                    f"{given}, its first result differs from that of the row by itself", where
                )
    return None


def _tried_shapes(row_shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if row_shape[0] != -1:
        yield row_shape
    else:
        yield from ((steps, *row_shape[1:]) for steps in TRIED_STEPS)


def _wrong_values(outputs: np.ndarray, mixture: Mixture) -> str | None:
    """Return what is wrong with outputs of the right shape and dtype."""
    if not np.isfinite(outputs).all():
        return "values that are not finite"
    combine = mixture.spec.combine
    if isinstance(combine, ProbabilitiesCombine):
        if outputs.min() < 0:
            return "negative probabilities"
        if (np.abs(outputs.sum(-1) - 1) > _SUM_TOLERANCE).any():
            return "probabilities that do not add up to 1"
    has_deviations = isinstance(combine, DensityCombine) and combine.deviation is None
    if has_deviations and outputs[:, outputs.shape[1] // 2 :].min() <= 0:
        return "standard deviations that are not positive"
    return None


def _is_close(outputs: np.ndarray, others: np.ndarray) -> bool:
    scale = max(np.abs(others).max(), 1e-6)
    return bool(np.abs(outputs - others).max() <= _ROW_TOLERANCE * scale)
