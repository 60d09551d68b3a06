"""Missing experts of a tree: what each contract makes of its rows, which have two or three experts.

Dimension letters: T rows, E experts.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.spec import ON_EXPERT_LOSS
from router.mixture.gate import MixtureGate
from router.moe.missing import StepMissing
from tests.unit.router.mixture.small_mixtures import (
    document,
    leaves,
    linear_gate,
    mixture_of,
    pairs_of,
)

E = 8
TREE = {
    "root": linear_gate(["a", "e4", "b"], "root.", top_k=2),
    "a": linear_gate(["e3", "e0", "e1"], "a.", top_k=2),
    "b": {"kind": "given", "input": "column", "choices": ["e2", "c"], "column": 1},
    "c": linear_gate(["e5", "e6", "e7"], "c.", top_k=1),
}
TENSORS = {
    f"{name}.weight": np.random.default_rng(0).standard_normal((len(gate["choices"]), 3))
    for name, gate in TREE.items()
    if gate["kind"] == "linear"
}
GATE = MixtureGate(mixture_of(document(TREE, E), TENSORS))


@settings(max_examples=150)
@given(
    missing=st.lists(st.booleans(), min_size=E, max_size=E),
    contracts=st.lists(st.sampled_from(ON_EXPERT_LOSS), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_row_is_computed_without_the_missing_experts_or_waits_for_them(
    missing: list[bool], contracts: list[str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_rows = len(contracts)
    inputs = {"x": rng.standard_normal((num_rows, 3)), "column": rng.integers(0, 2, (num_rows, 2))}
    first = GATE.choose(inputs)
    record = StepMissing([1] * num_rows, contracts, needs_an_expert=True)
    mask = np.array(missing)
    found = record.choose(0, mask if mask.any() else None, first, GATE.reselect(inputs))
    for row, contract in enumerate(contracts):
        given_ = inputs["column"][row].tolist()
        own = leaves(TREE, TENSORS, inputs["x"][row], given_)
        lost = {e for e in own if missing[e]}
        if contract == "drop":
            allowed = [e in own and not missing[e] for e in range(E)]
        else:
            allowed = [not is_missing for is_missing in missing]
        left = leaves(TREE, TENSORS, inputs["x"][row], given_, allowed)
        pairs = pairs_of(found)[row]
        if lost and (contract == "strict" or not left):
            assert pairs == {}
            assert record.awaited[row] == {(0, e) for e in lost}
            continue
        assert row not in record.awaited
        assert (row in record.inexact) == bool(lost)
        expected = left if lost else own
        assert list(pairs) == sorted(expected)
        np.testing.assert_allclose([pairs[e] for e in pairs], [expected[e] for e in pairs], 1e-12)
        np.testing.assert_allclose(sum(pairs.values()), 1.0, 1e-12)
