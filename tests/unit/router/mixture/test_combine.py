"""The combinations of mixtures against scipy and loops, pair by pair.

Dimension letters: T rows, K most experts of a row, C classes, D axes of a density.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import logsumexp
from scipy.stats import norm

from cluster.errors import ExpertFailedError, NotFiniteError
from experts.mixture.spec import MixtureSpec
from router.mixture.combine import combined
from tests.unit.router.mixture.small_mixtures import document, linear_gate

E, K = 5, 3
GATES = {"root": linear_gate([f"e{i}" for i in range(E)], top_k=K)}
SOURCES = {
    "mean": ("value",),
    "probabilities": ("probabilities", "label"),
    "vote": ("votes", "label"),
    "density": ("mean", "variance", "log_density"),
}
COMBINES: dict[str, dict[str, Any]] = {
    "mean": {"kind": "mean", "shape": [4]},
    "probabilities": {"kind": "probabilities", "classes": [7, -3, 10**12]},
    "vote": {"kind": "vote", "classes": ["älter", "b", "longer than the others"]},
    "density": {"kind": "density", "dimensions": 2, "target": "target"},
}


def spec_of(combine: Mapping[str, Any], dtype: str = "float64", real: str = "FP64") -> MixtureSpec:
    """Return a mixture of this combination, with every output that there is, named as its part."""
    kind = combine["kind"]
    sources = list(SOURCES[kind])
    if kind == "density" and "target" not in combine:
        sources.remove("log_density")
    datatypes = {"experts": "INT64", "label": "BYTES" if kind == "vote" else "INT64"}
    rows = "FP32" if dtype == "float32" else "FP64"
    inputs = [{"name": "x", "datatype": rows, "shape": [3]}]
    if "target" in combine:
        shape = [combine["dimensions"]]
        inputs.append({"name": "target", "datatype": rows, "shape": shape})
    outputs = [
        {"name": source, "datatype": datatypes.get(source, real), "from": source}
        for source in (*sources, "experts", "weights")
    ]
    whole = document(GATES, E, combine=combine, inputs=inputs, outputs=outputs, dtype=dtype)
    return MixtureSpec.model_validate(whole)


def combine_all(
    spec: MixtureSpec,
    rows: np.ndarray,
    weights: np.ndarray,
    ids: np.ndarray | None = None,
    is_present: np.ndarray | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    names: list[str] | None = None,
    **more: int,
) -> dict[str, np.ndarray]:
    """Combine rows, by default those of the first experts, all of which are present."""
    ids = np.tile(np.arange(weights.shape[1]), (len(rows), 1)) if ids is None else ids
    is_present = np.ones(ids.shape, bool) if is_present is None else is_present
    names = names or [output.name for output in spec.outputs]
    tensors = torch.from_numpy(rows), torch.from_numpy(weights)
    return combined(spec, *tensors, ids, is_present, inputs or {}, names, **more)


class Case:
    """Random rows, weights, experts and absent pairs, which hold NaN as if never written."""

    def __init__(self, seed: int, num_rows: int, spec: MixtureSpec) -> None:
        rng = np.random.default_rng(seed)
        dtype = np.dtype(spec.dtype)
        self.rows = rng.standard_normal((num_rows, K, *spec.combine.shape)).astype(dtype)
        if spec.combine.kind == "density":
            self.rows = np.abs(self.rows) + dtype.type(0.1)
        self.ids = np.array([rng.permutation(E)[:K] for _ in range(num_rows)], np.int64)
        self.ids = self.ids.reshape(num_rows, K)
        self.is_present = rng.random((num_rows, K)) < 0.8
        self.is_present[:, 1] = True
        shares = rng.random((num_rows, K)) * self.is_present
        self.weights = (shares / shares.sum(axis=1, keepdims=True)).astype(dtype)
        self.inputs = {"target": rng.standard_normal((num_rows, 2)).astype(dtype)}
        self.rows[~self.is_present] = np.nan

    def run(
        self, spec: MixtureSpec, rows: Any = slice(None), **options: Any
    ) -> dict[str, np.ndarray]:
        arrays = self.rows, self.weights, self.ids, self.is_present
        options = {"inputs": {name: a[rows] for name, a in self.inputs.items()}, **options}
        return combine_all(spec, *(array[rows] for array in arrays), **options)

    def pairs(self, row: int) -> list[tuple[int, float, np.ndarray]]:
        """Return expert, weight and output of each present pair, ascending by expert."""
        found = [
            (int(self.ids[row, k]), float(self.weights[row, k]), self.rows[row, k].astype(float))
            for k in range(K)
            if self.is_present[row, k]
        ]
        return sorted(found, key=lambda pair: pair[0])


def expected_of(spec: MixtureSpec, case: Case, row: int) -> dict[str, np.ndarray]:
    pairs = case.pairs(row)
    absent = K - len(pairs)
    parts: dict[str, Any] = {
        "experts": [e for e, _, _ in pairs] + [-1] * absent,
        "weights": [w for _, w, _ in pairs] + [0.0] * absent,
    }
    combine = spec.combine
    if combine.kind == "mean":
        parts["value"] = sum(w * values for _, w, values in pairs)
    elif combine.kind == "probabilities":
        parts["probabilities"] = sum(w * values for _, w, values in pairs)
        parts["label"] = [combine.classes[int(np.argmax(parts["probabilities"]))]]
    elif combine.kind == "vote":
        votes = np.zeros(len(combine.classes))
        for _, weight, scores in pairs:
            votes[int(np.argmax(scores))] += weight
        parts |= {"votes": votes, "label": [combine.classes[int(np.argmax(votes))]]}
    else:
        size = combine.dimensions
        means = np.array([values[:size] for _, _, values in pairs])
        given = np.full(size, combine.deviation) if combine.deviation else None
        deviations = np.array([v[size:] if given is None else given for _, _, v in pairs])
        weights = np.array([w for _, w, _ in pairs])[:, None]
        mean = (weights * means).sum(axis=0)
        within = sum(w * s**2 for w, s in zip(weights, deviations, strict=True))
        between = sum(w * (m - mean) ** 2 for w, m in zip(weights, means, strict=True))
        target = case.inputs["target"][row].astype(float)
        logs = norm.logpdf(target, means, deviations).sum(axis=1)
        parts |= {
            "mean": mean,
            "variance": within + between,
            "log_density": [logsumexp(logs, b=weights[:, 0])],
        }
    return parts


@settings(max_examples=80)
@given(
    kind=st.sampled_from(sorted(COMBINES)),
    dtype=st.sampled_from(["float32", "float64"]),
    real=st.sampled_from(["FP32", "FP64"]),
    deviation=st.sampled_from([None, 0.7]),
    num_rows=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_output_is_its_definition_pair_by_pair(
    kind: str, dtype: str, real: str, deviation: float | None, num_rows: int, seed: int
) -> None:
    combine = COMBINES[kind] | ({"deviation": deviation} if kind == "density" else {})
    spec = spec_of(combine, dtype, real)
    case = Case(seed, num_rows, spec)
    outputs = case.run(spec)
    assert list(outputs) == [output.name for output in spec.outputs]
    dtypes = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}
    for output in spec.outputs:
        array = outputs[output.name]
        assert len(array) == num_rows
        if output.datatype == "BYTES":
            assert array.dtype.kind == "U"
        else:
            assert array.dtype == dtypes[output.datatype]
    tolerance = 1e-6 if real == "FP32" else 1e-12
    for row in range(num_rows):
        for name, expected in expected_of(spec, case, row).items():
            got = outputs[name][row]
            assert got.shape == np.shape(expected)
            if outputs[name].dtype.kind == "f":
                np.testing.assert_allclose(got, expected, tolerance, tolerance)
            else:
                assert got.tolist() == list(expected)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(COMBINES)),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_has_the_same_bits_in_any_batch_and_whatever_the_order_of_its_pairs(
    kind: str, dtype: str, seed: int
) -> None:
    spec = spec_of(COMBINES[kind], dtype)
    case = Case(seed, 20, spec)
    whole = case.run(spec)
    rng = np.random.default_rng(seed)
    some = rng.permutation(20)[: rng.integers(1, 21)]
    for rows in (some, some[:1]):
        part = case.run(spec, rows)
        for name, array in part.items():
            assert array.tobytes() == whole[name][rows].tobytes(), name
    order = rng.permutation(K)
    for name in ("rows", "weights", "ids", "is_present"):
        setattr(case, name, np.ascontiguousarray(getattr(case, name)[:, order]))
    for name, array in case.run(spec).items():
        assert array.tobytes() == whole[name].tobytes(), name


def test_sequences_are_averaged_step_by_step() -> None:
    spec = MixtureSpec.model_validate(
        document(
            {"root": linear_gate(["e0", "e1"], input="c")},
            2,
            inputs=[
                {"name": "s", "datatype": "FP64", "shape": [-1, 3]},
                {"name": "c", "datatype": "FP64", "shape": [2]},
            ],
            experts={
                f"e{i}": {
                    "kind": "rnn", "file": "r", "cell": "gru", "returns": "sequence"
                } for i in range(2)
            },
            combine={"kind": "mean", "shape": [-1, 2]},
        )
    )  # fmt: skip
    for steps in (1, 4):
        rows = np.arange(2 * 2 * steps * 2, dtype=float).reshape(2, 2, steps, 2)
        weights = np.array([[0.25, 0.75], [1.0, 0.0]])
        is_present = np.array([[True, True], [True, False]])
        value = combine_all(spec, rows, weights, is_present=is_present)["value"]
        assert value.tolist() == [
            (0.25 * rows[0, 0] + 0.75 * rows[0, 1]).tolist(),
            rows[1, 0].tolist(),
        ]


def test_votes_and_labels_by_hand() -> None:
    spec = spec_of(COMBINES["vote"])
    # Experts 4 and 0 vote for the first class with 0.2 and 0.3, expert 2 for the last with 0.5; the
    # second row's scores tie within the expert, and the totals of its votes tie as well.
    rows = np.array([
        [[9.0, 1, 2], [0, 0, 1], [5, 4, 4]],
        [[1, 1, 0], [0, 0, 8], [3, 3, 3]],
    ])  # fmt: skip
    weights = np.array([[0.2, 0.5, 0.3], [0.25, 0.5, 0.25]])
    ids = np.array([[4, 2, 0], [0, 1, 2]])
    outputs = combine_all(spec, rows, weights, ids)
    assert outputs["votes"].tolist() == [[0.5, 0, 0.5], [0.5, 0, 0.5]]
    assert outputs["label"].tolist() == [["älter"], ["älter"]]
    assert outputs["experts"].tolist() == [[0, 2, 4], [0, 1, 2]]
    assert outputs["weights"].tolist() == [[0.3, 0.5, 0.2], [0.25, 0.5, 0.25]]


def test_a_density_far_from_every_mean_has_a_log() -> None:
    """The densities themselves round to 0; their logarithms do not."""
    spec = spec_of(COMBINES["density"] | {"deviation": 1.0})
    rows = np.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    target = {"target": np.array([[1e5, 0.0]])}
    outputs = combine_all(spec, rows, np.array([[0.5, 0.5, 0.0]]), inputs=target)
    right = np.log(0.5) - np.log(2 * np.pi) - 0.5 * (1e5 - 1) ** 2
    np.testing.assert_allclose(outputs["log_density"], [[right]], 1e-14)
    np.testing.assert_allclose(outputs["variance"], [[1.25, 1.0]], 1e-14)


def test_a_variance_is_not_the_difference_of_large_squares() -> None:
    spec = spec_of(COMBINES["density"])
    rows = np.array([[[1e9, 1e9, 1e-3, 1e-3]] * 3])
    target = {"target": np.zeros((1, 2))}
    outputs = combine_all(spec, rows, np.array([[0.25, 0.25, 0.5]]), inputs=target)
    np.testing.assert_allclose(outputs["variance"], [[1e-6, 1e-6]], 1e-12)


@pytest.mark.parametrize("wrong", [0.0, -0.5])
def test_a_deviation_must_be_positive(wrong: float) -> None:
    spec = spec_of(COMBINES["density"])
    case = Case(3, 6, spec)
    case.is_present[:] = True
    case.rows[:] = 1.0
    case.rows[4, 2, 3] = wrong
    with pytest.raises(ExpertFailedError, match=f"row 4, given: {wrong:g}") as error:
        case.run(spec)
    assert error.value.field == f"e{case.ids[4, 2]}"
    case.is_present[4, 2] = False
    assert np.isfinite(case.run(spec)["variance"]).all()


@pytest.mark.parametrize("kind", sorted(COMBINES))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_names_expert_and_row(kind: str, value: float) -> None:
    spec = spec_of(COMBINES[kind])
    case = Case(5, 6, spec)
    case.is_present[:] = True
    case.rows[:] = 1.0
    case.rows[3, 1, 0] = value
    with pytest.raises(NotFiniteError, match="row 3") as error:
        case.run(spec)
    assert error.value.field == f"e{case.ids[3, 1]}"
    with pytest.raises(NotFiniteError, match="row 103"):
        case.run(spec, first_row=100)


def test_a_result_beyond_its_datatype_names_output_and_row() -> None:
    spec = spec_of(COMBINES["mean"], real="FP32")
    rows = np.ones((2, 3, 4))
    rows[1] = 1e39
    with pytest.raises(NotFiniteError, match=r"row 1 .* in float32") as error:
        combine_all(spec, rows, np.full((2, 3), 1 / 3))
    assert error.value.field == "outputs.value"


def test_only_the_requested_outputs_are_returned_in_their_order() -> None:
    spec = spec_of(COMBINES["density"])
    case = Case(9, 4, spec)
    whole = case.run(spec)
    # Without a log density there needs to be no target.
    part = case.run(spec, inputs={}, names=["weights", "mean"])
    assert list(part) == ["weights", "mean"]
    assert all(part[name].tobytes() == whole[name].tobytes() for name in part)


def test_a_density_whose_weights_do_not_add_up_to_1_is_refused() -> None:
    gate = GATES["root"] | {"renormalize": False}
    whole = document(
        {"root": gate}, E, combine={"kind": "density", "dimensions": 1, "deviation": 1}
    )
    whole["outputs"] = [{"name": "mean", "datatype": "FP64", "from": "mean"}]
    with pytest.raises(ValidationError, match=r"gates\.root\.renormalize: .* density"):
        MixtureSpec.model_validate(whole)
    whole["gates"]["root"] = gate | {"top_k": E}
    assert MixtureSpec.model_validate(whole).combine.kind == "density"
