"""The gates of mixtures against the product rule written out, and against torch.

Dimension letters: T rows, E experts, C choices of a gate.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from cluster.errors import CheckpointError, InvalidRequestError, NotFiniteError
from cluster.spec import ON_EXPERT_LOSS
from router.mixture.gate import MixtureGate
from router.moe.missing import StepMissing
from tests.unit.router.mixture.small_mixtures import (
    Leaves,
    Tensors,
    document,
    leaves,
    linear_gate,
    mixture_of,
    pairs_of,
    softmax,
)

Inputs = dict[str, np.ndarray]
TREE: dict[str, Any] = {
    "root": linear_gate(["a", "e4", "b"], "root.", top_k=2),
    "a": linear_gate(["e3", "e0", "e1"], "a.", top_k=2, renormalize=False),
    "b": {"kind": "given", "input": "column", "choices": ["e2", "c"], "column": 1},
    "c": linear_gate(["e5", "e6"], "c.", top_k=1),
}
"""Uneven: a row has two or three experts, numbered in another order than the tree's."""


def gate_of(
    gates: dict[str, Any], num_experts: int, tensors: Tensors, **changes: Any
) -> MixtureGate:
    return MixtureGate(mixture_of(document(gates, num_experts, **changes), tensors))


def weights_of(gates: dict[str, Any], rng: np.random.Generator, width: int = 3) -> Tensors:
    """Return small integers, whose scores are exact and often tie."""
    tensors = {}
    for name, gate in gates.items():
        if gate["kind"] == "linear":
            num_choices = len(gate["choices"])
            tensors[f"{name}.weight"] = rng.integers(-2, 3, (num_choices, width)).astype(float)
            if rng.random() < 0.5:
                tensors[f"{name}.bias"] = rng.integers(-2, 3, num_choices).astype(float)
    return tensors


def rows_of(rng: np.random.Generator, num_rows: int, width: int = 3) -> Inputs:
    x = rng.integers(-2, 3, (num_rows, width)).astype(float)
    return {"x": x, "column": rng.integers(0, 2, (num_rows, 2))}


def check_rows(found: list[Leaves], expected: list[Leaves], rtol: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for got, right in zip(found, expected, strict=True):
        assert list(got) == sorted(right)  # ascending by number
        np.testing.assert_allclose([got[e] for e in got], [right[e] for e in got], rtol)


@st.composite
def trees(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Draw gates, the root first, and the number of their experts."""
    gates: dict[str, Any] = {}
    counts = {"gates": 0, "experts": 0}

    def gate(depth: int) -> str:
        name = f"g{counts['gates']}"
        counts["gates"] += 1
        gates[name] = {}  # keeps the place of the root
        is_given = draw(st.integers(0, 4)) == 0
        choices = []
        for _ in range(2 if is_given else draw(st.integers(1, 4))):
            if depth < 3 and draw(st.booleans()):
                choices.append(gate(depth + 1))
            else:
                choices.append(f"n{counts['experts']}")
                counts["experts"] += 1
        if is_given:
            column = draw(st.integers(0, 1))
            gates[name] = {
                "kind": "given", "input": "column", "column": column, "choices": choices
            }  # fmt: skip
        else:
            gates[name] = linear_gate(
                choices,
                f"{name}.",
                top_k=draw(st.integers(1, len(choices))),
                renormalize=draw(st.booleans()),
            )
        return name

    gate(0)
    numbers = draw(st.permutations(range(counts["experts"])))
    for drawn in gates.values():
        drawn["choices"] = [
            f"e{numbers[int(name[1:])]}" if name[0] == "n" else name for name in drawn["choices"]
        ]
    return gates, counts["experts"]


@settings(max_examples=200)
@given(
    tree=trees(),
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(0, 9),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
)
def test_a_choice_is_the_product_rule_and_leaves_out_what_leads_to_no_allowed_expert(
    tree: tuple[dict[str, Any], int], seed: int, num_rows: int, share: float
) -> None:
    """Ties go to the first."""
    gates, num_experts = tree
    rng = np.random.default_rng(seed)
    tensors, inputs = weights_of(gates, rng), rows_of(rng, num_rows)
    gate = MixtureGate(mixture_of(document(gates, num_experts), tensors))
    given_rows = list(zip(inputs["x"], inputs["column"].tolist(), strict=True))
    choice = gate.choose(inputs)
    assert gate.num_experts == num_experts
    assert choice.ids.shape == (num_rows, gate.max_chosen) == tuple(choice.weights.shape)
    assert choice.ids.dtype == np.int64
    assert choice.weights.dtype == torch.float64
    check_rows(pairs_of(choice), [leaves(gates, tensors, *row) for row in given_rows])
    assert all(choice.weights.numpy()[~choice.served()] == 0)
    if all(g.get("renormalize", True) for g in gates.values()):
        np.testing.assert_allclose(choice.weights.sum(1), 1.0, 1e-12)
    some = rng.permutation(num_rows)[:5]
    allowed = rng.random((len(some), num_experts)) < share
    check_rows(
        pairs_of(gate.reselect(inputs)(some, allowed)),
        [
            leaves(gates, tensors, *given_rows[r], allowed=may)
            for r, may in zip(some, allowed, strict=True)
        ],
    )


def test_a_tree_worked_by_hand() -> None:
    log = np.log
    tensors = {
        "root.weight": np.zeros((3, 3)), "root.bias": log([6.0, 3.0, 1.0]),
        "a.weight": np.zeros((3, 3)), "a.bias": log([1.0, 5.0, 4.0]),
        "c.weight": np.zeros((2, 3)),
    }  # fmt: skip
    gate = gate_of(TREE, 7, tensors)
    inputs = {"x": np.zeros((1, 3)), "column": np.array([[9, 1]])}
    # The root keeps a (6 of 9) and e4 (3 of 9); a keeps e0 (5 of 10) and e1 (4 of 10) as they are.
    check_rows(pairs_of(gate.choose(inputs)), [{0: 2 / 3 * 0.5, 1: 2 / 3 * 0.4, 4: 1 / 3}], 1e-14)
    # Without e4 the root keeps a and b, and b's row was given to c, whose scores tie.
    allowed = np.array([[True, True, True, True, False, True, True]])
    check_rows(
        pairs_of(gate.reselect(inputs)(np.array([0]), allowed)),
        [{0: 6 / 7 * 0.5, 1: 6 / 7 * 0.4, 5: 1 / 7}],
        1e-14,
    )
    # Nothing is left below b and below e4: the root has a alone, and a has e3 alone, which fills.
    only = np.array([[False, False, True, True, False, False, False]])
    again = gate.reselect(inputs)(np.array([0]), only)
    assert (pairs_of(again), again.ids.tolist()) == ([{3: 1.0}], [[3, 3, 3]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_given_gate_that_was_not_reached_may_have_any_value(dtype: str) -> None:
    gates = TREE | {"root": linear_gate(["a", "e4", "b"], "root.", top_k=1)}
    tensors = {
        "root.weight": np.zeros((3, 3)), "root.bias": np.array([0.0, 2.0, 1.0]),
        "a.weight": np.zeros((3, 3)), "c.weight": np.zeros((2, 3)),
    }  # fmt: skip
    gate = gate_of(gates, 7, tensors, dtype=dtype)
    inputs = {"x": np.zeros((1, 3)), "column": np.array([[0, 77]])}
    assert pairs_of(gate.choose(inputs)) == [{4: 1.0}]
    allowed = np.ones((1, 7), bool)
    allowed[0, 4] = False
    # b is second by score, and its column names nothing: the row goes on to the third.
    assert list(pairs_of(gate.reselect(inputs)(np.array([0]), allowed))[0]) == [0, 3]


@pytest.mark.parametrize("datatype", ["UINT8", "INT32", "INT64"])
def test_a_given_value_out_of_range_is_refused_with_its_row(datatype: str) -> None:
    gates = {"root": {"kind": "given", "input": "c", "choices": ["e1", "e0"], "column": 3}}
    inputs = [
        {"name": "x", "datatype": "FP64", "shape": [3]},
        {"name": "c", "datatype": datatype, "shape": [2, 2]},
    ]
    gate = gate_of(gates, 2, {}, inputs=inputs)
    dtype = datatype.lower()
    given = {"x": np.zeros((4, 3)), "c": np.zeros((4, 2, 2), dtype)}
    given["c"][:, 1, 1] = [0, 1, 1, 0]
    assert pairs_of(gate.choose(given)) == [{1: 1.0}, {0: 1.0}, {0: 1.0}, {1: 1.0}]
    wrong = {"UINT8": 255, "INT32": -1, "INT64": -(2**63)}[datatype]
    given["c"][2, 1, 1] = wrong
    with pytest.raises(InvalidRequestError) as refused:
        gate.choose(given)
    assert refused.value.field == "inputs.c"
    for part in (f"no choice {wrong};", "row 2", "column 3", "0 to 1"):
        assert part in refused.value.message


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", functional.relu),
        ("tanh", torch.tanh),
        ("gelu", functional.gelu),
        ("silu", functional.silu),
        ("sigmoid", torch.sigmoid),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_scores_of_a_network_are_torchs(name: str, function: Any, dtype: str) -> None:
    rng = np.random.default_rng(1)
    sizes = [3, 33, 17, 5]
    tensors: dict[str, np.ndarray] = {}
    for layer, (width, outputs) in enumerate(itertools.pairwise(sizes)):
        tensors[f"m.{layer}.weight"] = rng.standard_normal((outputs, width))
        if layer != 1:  # a bias may be absent
            tensors[f"m.{layer}.bias"] = rng.standard_normal(outputs)
    names = [f"e{i}" for i in range(5)]
    gates = {"root": linear_gate(names, "m.") | {"kind": "mlp", "activation": name}}
    gate = gate_of(gates, 5, tensors, dtype=dtype)
    x = rng.standard_normal((200, 3)) * 3
    values = torch.from_numpy(x.astype(dtype)).double()
    for layer in range(3):
        bias = tensors.get(f"m.{layer}.bias")
        values = functional.linear(
            function(values) if layer else values,
            torch.from_numpy(tensors[f"m.{layer}.weight"].astype(dtype)).double(),
            None if bias is None else torch.from_numpy(bias.astype(dtype)).double(),
        )
    inputs = {"x": x, "column": np.zeros((200, 2), np.int64)}
    choice = gate.choose(inputs)
    tolerance = 2e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(choice.weights, values.softmax(1), tolerance, tolerance)
    assert (choice.ids == np.arange(5)).all()


@pytest.mark.parametrize("pool", ["flatten", "mean", "last"])
def test_a_gate_looks_at_the_pooled_row(pool: str) -> None:
    rng = np.random.default_rng(2)
    steps, width = 5, 4
    shape = [steps if pool == "flatten" else -1, width]
    size = steps * width if pool == "flatten" else width
    weight = rng.standard_normal((6, size))
    names = [f"e{i}" for i in range(6)]
    spec = document(
        {"root": linear_gate(names, input="s", pool=pool)},
        6,
        inputs=[
            {"name": "x", "datatype": "FP64", "shape": [3]},
            {"name": "s", "datatype": "FP32", "shape": shape},
        ],
    )
    gate = MixtureGate(mixture_of(spec, {"weight": weight}))
    s = rng.standard_normal((7, steps, width)).astype(np.float32)
    vectors = {"flatten": s.reshape(7, -1), "mean": s.mean(axis=1, dtype=float), "last": s[:, -1]}
    expected = [softmax(weight @ vector.astype(float)) for vector in vectors[pool]]
    inputs = {"x": np.zeros((7, 3)), "s": s}
    np.testing.assert_allclose(gate.choose(inputs).weights, expected, 1e-12)
    if pool != "flatten":
        with pytest.raises(InvalidRequestError, match=r"inputs\.s: .*at least one step"):
            gate.choose({"x": np.zeros((7, 3)), "s": s[:, :0]})


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(["float32", "float64"]),
    kind=st.sampled_from(["relu", "tanh", "gelu", "silu", "sigmoid", "linear"]),
    width=st.integers(1, 130),
    num_choices=st.integers(1, 40),
    num_rows=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_has_the_same_bits_in_any_batch(
    dtype: str, kind: str, width: int, num_choices: int, num_rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    names = [f"e{i}" for i in range(num_choices)]
    root = linear_gate(names, top_k=int(rng.integers(1, num_choices + 1)))
    tensors = {"weight": rng.standard_normal((num_choices, width))}
    if kind != "linear":
        root |= {"kind": "mlp", "activation": kind}
        tensors = {
            "0.weight": rng.standard_normal((19, width)),
            "1.weight": rng.standard_normal((num_choices, 19)),
        }
    spec = document(
        {"root": root},
        num_choices,
        dtype=dtype,
        inputs=[{"name": "x", "datatype": "FP32", "shape": [width]}],
    )
    gate = MixtureGate(mixture_of(spec, tensors))
    x = rng.standard_normal((num_rows, width)).astype(np.float32)
    whole = gate.choose({"x": x})
    some = rng.permutation(num_rows)[: rng.integers(1, num_rows + 1)]
    for rows in ([int(some[0])], some):
        part = gate.choose({"x": x[rows]})
        assert part.ids.tobytes() == whole.ids[rows].tobytes()
        assert part.weights.numpy().tobytes() == whole.weights.numpy()[rows].tobytes()


def test_rows_of_a_tree_have_the_same_bits_alone_and_where_all_experts_are_allowed() -> None:
    rng = np.random.default_rng(4)
    tensors = {name: rng.standard_normal(t.shape) for name, t in weights_of(TREE, rng).items()}
    gate = gate_of(TREE, 7, tensors, dtype="float32")
    inputs = rows_of(rng, 300) | {"x": rng.standard_normal((300, 3))}
    whole = gate.choose(inputs)
    served = whole.served()
    for row in range(300):
        alone = gate.choose({name: array[row : row + 1] for name, array in inputs.items()})
        assert alone.ids.tobytes() == whole.ids[row].tobytes()
        assert alone.weights.numpy().tobytes() == whole.weights.numpy()[row].tobytes()
        assert (alone.served()[0] == served[row]).all()
    again = gate.reselect(inputs)(np.arange(300), np.ones((300, 7), bool))
    assert again.ids.tobytes() == whole.ids.tobytes()
    assert again.weights.numpy().tobytes() == whole.weights.numpy().tobytes()
    assert (again.served() == served).all()


def test_large_scores_neither_overflow_nor_hide_the_order() -> None:
    tensors = {"weight": np.diag([1e30, 2e30, -1e30])}
    gates = {"root": linear_gate(["e0", "e1", "e2"], top_k=2)}
    gate = gate_of(gates, 3, tensors, dtype="float32")
    inputs = {"x": np.full((1, 3), 1e6), "column": np.zeros((1, 2), np.int64)}
    assert pairs_of(gate.choose(inputs)) == [{0: 0.0, 1: 1.0}]
    allowed = np.array([[True, False, True]])
    assert pairs_of(gate.reselect(inputs)(np.array([0]), allowed)) == [{0: 1.0, 2: 0.0}]


def test_scores_that_are_not_finite_fail_the_rows_that_reach_their_gate_and_name_both() -> None:
    gates = {
        "root": {"kind": "given", "input": "column", "choices": ["bad", "good"]},
        "bad": linear_gate(["e0", "e1"], "bad."),
        "good": linear_gate(["e2", "e3"], "good."),
    }
    tensors = {"bad.weight": np.full((2, 3), 1e30), "good.weight": np.ones((2, 3))}
    gate = gate_of(gates, 4, tensors, dtype="float32")
    inputs = {"x": np.full((4, 3), 1e10), "column": np.ones((4, 2), np.int64)}
    assert pairs_of(gate.choose(inputs)) == [{2: 0.5, 3: 0.5}] * 4
    inputs["column"][2:, 0] = 0
    with pytest.raises(NotFiniteError, match="row 2") as error:
        gate.choose(inputs)
    assert error.value.field == "gates.bad"
    inputs["x"][2, 0] = -2e10  # inf - inf
    with pytest.raises(NotFiniteError, match="row 2"):
        gate.choose(inputs)
    inputs["x"][:] = 1
    assert len(gate.choose(inputs).ids) == 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bias": np.zeros(2)}, r"no tensor root\.weight"),
        ({"weight": np.zeros((3, 3))}, r"root\.weight .*\[2, 3\] \(given: \[3, 3\]\)"),
        ({"weight": np.zeros((2, 4))}, r"root\.weight .*\[2, 3\] \(given: \[2, 4\]\)"),
        ({"weight": np.zeros(3)}, r"root\.weight .*given: \[3\]"),
        ({"weight": np.zeros((2, 3)), "bias": np.zeros(3)}, r"root\.bias .*given: \[3\]"),
        ({"weight": np.zeros((2, 3)), "biass": np.zeros(2)}, r"not used: root\.biass"),
        ({"weight": np.zeros((2, 3), int)}, r"root\.weight is I64"),
        ({"weight": np.full((2, 3), np.nan)}, r"root\.weight .*not finite"),
    ],
)
def test_a_gate_with_wrong_tensors_is_refused_with_file_gate_and_tensor(
    tensors: Tensors, message: str
) -> None:
    named = {f"root.{name}": tensor for name, tensor in tensors.items()}
    gates = {"root": linear_gate(["e0", "e1"], "root.")}
    with pytest.raises(CheckpointError, match=message) as error:
        gate_of(gates, 2, named)
    assert error.value.field == "gates.safetensors: gates.root"


def test_a_network_whose_layers_do_not_fit_is_refused() -> None:
    gates = {"root": linear_gate(["e0", "e1"]) | {"kind": "mlp"}}
    tensors = {"0.weight": np.zeros((5, 3)), "1.weight": np.zeros((2, 4))}
    with pytest.raises(CheckpointError, match=r"1\.weight .*\[2, 5\] \(given: \[2, 4\]\)"):
        gate_of(gates, 2, tensors)
    with pytest.raises(CheckpointError, match=r"no tensor 0\.weight"):
        gate_of(gates, 2, {"1.weight": np.zeros((2, 3))})


FAIR_TREE = TREE | {"a": TREE["a"] | {"renormalize": True}}
FAIR_TENSORS = {
    f"{name}.weight": np.random.default_rng(0).standard_normal((len(gate["choices"]), 3))
    for name, gate in FAIR_TREE.items()
    if gate["kind"] == "linear"
}
FAIR_GATE = gate_of(FAIR_TREE, 7, FAIR_TENSORS)


@settings(max_examples=150)
@given(
    missing=st.lists(st.booleans(), min_size=7, max_size=7),
    contracts=st.lists(st.sampled_from(ON_EXPERT_LOSS), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_row_is_computed_without_the_missing_experts_or_waits_for_them(
    missing: list[bool], contracts: list[str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_rows = len(contracts)
    inputs = {"x": rng.standard_normal((num_rows, 3)), "column": rng.integers(0, 2, (num_rows, 2))}
    first = FAIR_GATE.choose(inputs)
    record = StepMissing([1] * num_rows, contracts, needs_an_expert=True)
    mask = np.array(missing)
    found = record.choose(0, mask if mask.any() else None, first, FAIR_GATE.reselect(inputs))
    for row, contract in enumerate(contracts):
        given_ = inputs["column"][row].tolist()
        own = leaves(FAIR_TREE, FAIR_TENSORS, inputs["x"][row], given_)
        lost = {e for e in own if missing[e]}
        if contract == "drop":
            allowed = [e in own and not missing[e] for e in range(7)]
        else:
            allowed = [not is_missing for is_missing in missing]
        left = leaves(FAIR_TREE, FAIR_TENSORS, inputs["x"][row], given_, allowed)
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
