"""The combination of a mixture: what a row's experts and their weights make of it together.

Everything is computed in float64, pair by pair in the order of the experts' numbers, and rounded
once to the datatype of the output. A row's result is the same bits alone and in any batch.

Dimension letters: T rows, K most experts of a row, C classes, D axes of a density, W the shape of
an expert's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import ExpertFailedError, NotFiniteError
from experts.mixture.parts import (
    ClassesCombine,
    Combine,
    DensityCombine,
    MeanCombine,
    OutputSource,
    VoteCombine,
)
from experts.mixture.spec import MixtureSpec
from router.messages.tensor_bytes import NUMPY_DTYPES
from router.mixture.sums import sum_first

NO_EXPERT = -1
"""In the output ``experts`` where a row has fewer experts than another may have."""


def combined(
    spec: MixtureSpec,
    rows: torch.Tensor,
    weights: torch.Tensor,
    ids: np.ndarray,
    is_present: np.ndarray,
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    first_row: int = 0,
) -> dict[str, np.ndarray]:
    """Return the ``outputs`` [T, *shape] of one request by name, in the datatypes of ``spec``.

    ``rows`` [T, K, *W] are the experts' outputs, ``weights`` [T, K] and ``ids`` [T, K] the gate's.
    A pair that is not ``is_present``, bool [T, K], counts nothing: weights were normalised before.
    ``inputs`` have the target of a log density. Labels are int64 or numpy's unicode.

    Raises :class:`NotFiniteError`, whose field is the expert's name, for an expert's output that is
    NaN or infinite; the same, whose field is the output, for a result beyond the range of its
    datatype; and :class:`ExpertFailedError` for a deviation that is not positive. Errors name the
    row, counted from ``first_row``.
    """
    by_name = {output.name: output for output in spec.outputs}
    wanted = [by_name[name] for name in outputs]
    pairs = _ordered(rows, weights, ids, is_present)
    where = _Where(spec.expert_names, pairs.ids, first_row)
    _check_outputs(pairs.values, where)
    parts: dict[OutputSource, np.ndarray] = {
        "experts": np.where(pairs.is_present, pairs.ids, NO_EXPERT),
        "weights": pairs.weights,
    }
    sources: set[OutputSource] = {output.source for output in wanted}
    if sources - parts.keys():
        with np.errstate(all="ignore"):  # whatever overflows is noticed below
            parts |= _combination(spec.combine, pairs, where, sources, inputs)
    result = {}
    for output in wanted:
        part = parts[output.source]
        if output.datatype in NUMPY_DTYPES:
            with np.errstate(all="ignore"):
                part = part.astype(NUMPY_DTYPES[output.datatype])
            _check_result(part, output.name, first_row)
        result[output.name] = part
    return result


@dataclass(frozen=True, slots=True)
class _Where:
    """Where a pair is, for errors: the experts' ``names``, the ``ids`` [T, K], the first row."""

    names: Sequence[str]
    ids: np.ndarray
    first_row: int

    def first(self, is_wrong: np.ndarray) -> tuple[int, str]:
        """Return the row's number and the expert's name of the first wrong pair [T, K]."""
        row, rank = np.argwhere(is_wrong)[0].tolist()
        return self.first_row + row, self.names[self.ids[row, rank]]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The pairs of T rows, ascending by expert in each row, absent ones last and all 0.

    ``values`` [T, K, *W] have the dtype of the experts' outputs; ``weights`` [T, K] are float64.
    """

    values: np.ndarray
    weights: np.ndarray
    ids: np.ndarray
    is_present: np.ndarray

    def weighted_sum(self, values: np.ndarray) -> np.ndarray:
        """Return the weighted sum of ``values`` [T, K, …] over K, in float64."""
        shape = (-1, *[1] * (values.ndim - 2))
        total = np.zeros((len(values), *values.shape[2:]))
        term = np.empty_like(total)
        for rank in range(values.shape[1]):
            weights = self.weights[:, rank].reshape(shape)
            np.multiply(values[:, rank], weights, out=term, dtype=np.float64)
            total += term
        return total


def _ordered(
    rows: torch.Tensor, weights: torch.Tensor, ids: np.ndarray, is_present: np.ndarray
) -> _Pairs:
    values = rows.detach().cpu().numpy()
    shares = weights.detach().cpu().numpy().astype(np.float64)
    keys = np.where(is_present, ids, np.iinfo(np.int64).max)
    if (keys[:, 1:] < keys[:, :-1]).any():
        order = keys.argsort(axis=1, kind="stable")
        values = values[np.arange(len(values))[:, None], order]
        shares, ids, is_present = (
            np.take_along_axis(array, order, axis=1) for array in (shares, ids, is_present)
        )
    if not is_present.all():
        shares = np.where(is_present, shares, 0.0)
        present = is_present.reshape(*is_present.shape, *[1] * (values.ndim - 2))
        values = np.where(present, values, values.dtype.type(0))
    return _Pairs(values, shares, ids, is_present)


def _check_outputs(values: np.ndarray, where: _Where) -> None:
    """Raise :class:`NotFiniteError` for an expert's output of ``values`` [T, K, *W]."""
    is_finite = np.isfinite(values)
    if not is_finite.all():
        row, name = where.first(~is_finite.all(axis=tuple(range(2, values.ndim))))
        raise NotFiniteError(f"the expert's output for row {row} is NaN or infinite", name)


def _combination(
    combine: Combine,
    pairs: _Pairs,
    where: _Where,
    sources: set[OutputSource],
    inputs: Mapping[str, np.ndarray],
) -> dict[OutputSource, np.ndarray]:
    if isinstance(combine, DensityCombine):
        return _density(combine, pairs, where, sources, inputs)
    if isinstance(combine, MeanCombine):
        return {"value": pairs.weighted_sum(pairs.values)}
    if isinstance(combine, VoteCombine):
        return _classes(combine, "votes", pairs.weighted_sum(_ballots(pairs.values)))
    return _classes(combine, "probabilities", pairs.weighted_sum(pairs.values))


def _ballots(scores: np.ndarray) -> np.ndarray:
    """Return 1 at the largest of the scores [T, K, C], the first of equal ones, and 0 elsewhere."""
    ballots = np.zeros(scores.shape, np.float32)
    np.put_along_axis(ballots, scores.argmax(axis=-1, keepdims=True), 1, axis=-1)
    return ballots


def _classes(
    combine: ClassesCombine, source: OutputSource, totals: np.ndarray
) -> dict[OutputSource, np.ndarray]:
    is_text = isinstance(combine.classes[0], str)
    labels = np.array(combine.classes, np.str_ if is_text else np.int64)
    return {source: totals, "label": labels[totals.argmax(axis=-1, keepdims=True)]}


def _density(
    combine: DensityCombine,
    pairs: _Pairs,
    where: _Where,
    sources: set[OutputSource],
    inputs: Mapping[str, np.ndarray],
) -> dict[OutputSource, np.ndarray]:
    size = combine.dimensions
    means = pairs.values[..., :size].astype(np.float64)  # [T, K, D]
    if combine.deviation is None:
        deviations = pairs.values[..., size:].astype(np.float64)
        deviations[~pairs.is_present] = 1.0  # counts nothing, and divides by nothing
        least = deviations.min(axis=-1)  # [T, K]
        if (least <= 0).any():
            row, name = where.first(least <= 0)
            value = least[least <= 0][0]
            raise ExpertFailedError(
                f"a deviation must be above 0 (row {row}, given: {value:g})", name
            )
    else:
        deviations = np.full_like(means, combine.deviation)
    mean = pairs.weighted_sum(means)
    parts: dict[OutputSource, np.ndarray] = {"mean": mean}
    if "variance" in sources:
        # The law of total variance, without the difference of two large squares.
        parts["variance"] = pairs.weighted_sum(deviations**2 + (means - mean[:, None]) ** 2)
    if "log_density" in sources and combine.target is not None:
        target = inputs[combine.target].astype(np.float64)[:, None]  # [T, 1, D]
        parts["log_density"] = _log_density(pairs, target, means, deviations)
    return parts


def _log_density(
    pairs: _Pairs, target: np.ndarray, means: np.ndarray, deviations: np.ndarray
) -> np.ndarray:
    """Return the log density [T, 1] at ``target`` [T, 1, D]."""
    terms = -0.5 * ((target - means) / deviations) ** 2 - np.log(deviations)  # [T, K, D]
    logs = sum_first(np.ascontiguousarray(np.moveaxis(terms, -1, 0)))  # [T, K]
    logs += np.log(pairs.weights) - 0.5 * means.shape[-1] * np.log(2 * np.pi)
    largest = logs.max(axis=1, keepdims=True)
    shares = np.exp(logs - np.maximum(largest, np.finfo(logs.dtype).min))
    result: np.ndarray = largest + np.log(sum_first(np.ascontiguousarray(shares.T)))[:, None]
    return result


def _check_result(part: np.ndarray, name: str, first_row: int) -> None:
    is_finite = np.isfinite(part)
    if not is_finite.all():
        row = first_row + int(np.argwhere(~is_finite)[0][0])
        raise NotFiniteError(
            f"the result of row {row} is NaN or infinite in {part.dtype}", f"outputs.{name}"
        )
