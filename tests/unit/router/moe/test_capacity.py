"""How many tokens an expert takes of a step, and who takes the others.

The oracle asks one token and one expert at a time. T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralForCausalLM

from experts.families.base import GateSpec
from router.config.capacity import CapacityConfig
from router.engine.scheduling.scheduler import Limits
from router.moe.capacity import CapacityLimit, Placed, tokens_per_expert, within_capacity
from router.moe.gate import Choice, Gate
from router.moe.missing import StepMissing
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import check_greedy, prompt_of
from tests.unit.router.moe.test_missing import go_on, needed, tokens_of

Chain = list[dict[int, float]]
"""The weight of each expert of each token."""


def place(
    probabilities: list[list[float]],
    k: int,
    capacity: int,
    lost: set[int] = frozenset(),  # type: ignore[assignment]
    going: list[bool] | None = None,
    spec: GateSpec = GateSpec(renormalises=True),  # noqa: B008
) -> tuple[Placed, Choice]:
    """Place tokens whose gate has these probabilities [T, E]; also returns its own choice."""
    num_experts = len(probabilities[0])
    gate = Gate(spec, k, lambda hidden_states: hidden_states)
    logits = torch.tensor(probabilities, dtype=torch.float64).log().float()
    with torch.inference_mode():
        ids, weights = gate.choose(logits)
        pairs = None if going is None else np.flatnonzero(np.repeat(going, k))
        own = Choice(ids.numpy(), weights, pairs)
        mask = np.isin(np.arange(num_experts), list(lost))
        return within_capacity(own, capacity, mask, partial(gate.choose_anew, logits)), own


def got(choice: Choice) -> Chain:
    pairs = range(choice.ids.size) if choice.pairs is None else choice.pairs.tolist()
    chain: Chain = [{} for _ in choice.ids]
    for token, rank in (divmod(pair, choice.ids.shape[1]) for pair in pairs):
        assert choice.ids[token, rank] not in chain[token]
        chain[token][int(choice.ids[token, rank])] = float(choice.weights[token, rank])
    return chain


def oracle(
    probabilities: list[list[float]], k: int, capacity: int, going: list[bool]
) -> tuple[list[set[int]], Counter[int]]:
    """Return the experts of each token, and how often each had no room."""
    has: list[set[int]] = [set() for _ in probabilities]
    counts: Counter[int] = Counter()
    overflow: Counter[int] = Counter()
    lines = [sorted(range(len(p)), key=lambda e, p=p: -p[e]) for p in probabilities]
    for rank in range(len(probabilities[0])):
        for token, line in enumerate(lines):
            if not going[token] or len(has[token]) == k or rank >= len(line):
                continue
            expert = line[rank]
            if counts[expert] < capacity:
                counts[expert] += 1
                has[token].add(expert)
            else:
                overflow[expert] += 1
    return has, overflow


@pytest.mark.parametrize(
    ("config", "num_pairs", "num_experts", "expected"),
    [
        (CapacityConfig(tokens=3), 1000, 8, 3),
        (CapacityConfig(factor=1.0), 64, 8, 8),
        (CapacityConfig(factor=1.25), 64, 8, 10),
        (CapacityConfig(factor=1.0), 65, 8, 9),
        (CapacityConfig(factor=0.5), 2, 8, 1),
        (CapacityConfig(factor=2.0), 0, 8, 1),
    ],
)
def test_the_capacity_is_a_number_or_a_multiple_of_equal_loads(
    config: CapacityConfig, num_pairs: int, num_experts: int, expected: int
) -> None:
    assert tokens_per_expert(config, num_pairs, num_experts) == expected


@pytest.mark.parametrize("keys", [{}, {"factor": 1.0, "tokens": 2}], ids=["none", "both"])
def test_a_capacity_is_given_in_one_way(keys: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of factor and tokens"):
        CapacityConfig.model_validate(keys)


FIRST = [8, 4, 2, 1]


@pytest.mark.parametrize(
    "spec",
    [
        GateSpec(num_groups=4, topk_groups=2),
        GateSpec(score="sigmoid", num_groups=4, topk_groups=2, best_of_group=2),
    ],
    ids=["deepseek-v2", "deepseek-v3"],
)
@pytest.mark.parametrize("capacity", [1, 9, 40])
def test_gates_with_groups_leave_no_room_that_someone_lacks(spec: GateSpec, capacity: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 16, generator=generator) + 2 * torch.randn(16, generator=generator)
    placed, own = place(logits.exp().tolist(), 4, capacity, spec=spec)
    has = [set(one) for one in got(placed.choice)]
    counts = Counter(expert for one in has for expert in one)
    assert max(counts.values()) <= capacity
    full = {expert for expert, count in counts.items() if count == capacity}
    for chosen, one in zip(own.ids.tolist(), has, strict=True):
        assert set(chosen) - one <= full
        assert len(one) == 4 or set(range(16)) - one <= full
    moved = [t for t, one in enumerate(has) if one != set(own.ids[t].tolist())]
    assert placed.rows.tolist() == moved
    assert bool(moved) == bool(placed.overflow.sum())
    assert moved or capacity == 40


@st.composite
def _steps(draw: st.DrawFn) -> tuple[list[list[float]], int, int, list[bool]]:
    num_experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, num_experts))
    row = st.permutations(range(1, num_experts + 1)).map(lambda r: [float(2**p) for p in r])
    # Skewed, as real gates are: many tokens of one mind.
    rows = draw(st.lists(row, min_size=1, max_size=3))
    probabilities = draw(st.lists(st.sampled_from(rows), min_size=1, max_size=20))
    going = draw(st.lists(st.booleans(), min_size=len(probabilities), max_size=len(probabilities)))
    return probabilities, k, draw(st.integers(1, 8)), going


@settings(max_examples=200)
@given(_steps())
def test_capacity_as_the_oracle_has_it(
    step: tuple[list[list[float]], int, int, list[bool]],
) -> None:
    """First choices are placed before second ones, and a token without room passes."""
    probabilities, k, capacity, going = step
    placed, own = place(probabilities, k, capacity, going=going)
    has, overflow = oracle(probabilities, k, capacity, going)
    chain = got(placed.choice)
    assert [set(one) for one in chain] == has
    counts = Counter(e for one in chain for e in one)
    assert all(count <= capacity for count in counts.values())
    for token, one in enumerate(chain):
        total = sum(probabilities[token][e] for e in one)
        assert one == pytest.approx({e: probabilities[token][e] / total for e in one}, rel=1e-5)
        if going[token]:  # what it goes past is full
            worst = min((probabilities[token][e] for e in one), default=0.0)
            limit = worst if len(one) == k else 0.0
            preferred = [e for e, p in enumerate(probabilities[token]) if p > limit]
            assert all(e in one or counts[e] == capacity for e in preferred)
    full = {e: n for e, n in enumerate(placed.overflow.tolist()) if n}
    assert full == dict(overflow) if placed.choice is not own else not overflow
    moved = [t for t, (a, b) in enumerate(zip(chain, got(own), strict=True)) if set(a) != set(b)]
    assert placed.rows.tolist() == moved


def test_only_a_strict_token_waits_for_a_lost_expert_that_is_next_in_line() -> None:
    """The first token fills expert 0; expert 1, which is next for all others, is lost."""
    gate = Gate(GateSpec(renormalises=True), 1, lambda hidden_states: hidden_states)
    logits = torch.tensor([FIRST] * 4).log()
    record = StepMissing([1] * 4, ["strict", "strict", "next_expert", "drop"])
    limit = CapacityLimit(CapacityConfig(tokens=1), len(FIRST))
    with torch.inference_mode():
        ids, weights = gate.choose(logits)
        own, lost = Choice(ids.numpy(), weights), np.arange(len(FIRST)) == 1
        choice = limit.apply(7, own, lost, record, partial(gate.choose_anew, logits))
    assert [set(one) for one in got(choice)] == [{0}, set(), {2}, {3}]
    assert record.awaited == {1: {(7, 1)}}
    assert record.rows_by_contract() == {"next_expert": 1, "drop": 1}


def test_a_gate_of_what_is_no_number_ends_too() -> None:
    placed, _ = place([[float("nan")] * 4] * 5, k=2, capacity=1)
    counts = Counter(e for one in got(placed.choice) for e in one)
    assert max(counts.values(), default=0) <= 1


@pytest.fixture(scope="module")
def plain(folder: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.fixture
def tight(folder: Path) -> Iterator[LocalCluster]:
    """A cluster whose experts take one token of a step each."""
    with closing(LocalCluster(folder, capacity=CapacityConfig(tokens=1))) as cluster:
        yield cluster


PROMPTS = [prompt_of(9, seed) for seed in range(6)]


def test_no_expert_computes_more_than_its_capacity_and_answers_say_so(tight: LocalCluster) -> None:
    requests = [greedy_request(f"r{i}", prompt, 6) for i, prompt in enumerate(PROMPTS)]
    answers = tight.generate(*requests)
    frames = tight.transport.frames
    assert max(max(frame.num_tokens_per_expert) for frame in frames) == 1
    assert sum(tight.overflow.values()) > 0
    assert [(len(event.token_ids), event.exact) for [event] in answers] == [(6, False)] * 6


@pytest.mark.parametrize("capacity", [None, CapacityConfig(factor=1e6)])
def test_without_overflow_answers_are_exact(
    folder: Path, plain: MixtralForCausalLM, capacity: CapacityConfig | None
) -> None:
    requests = [greedy_request(f"r{i}", prompt, 6) for i, prompt in enumerate(PROMPTS)]
    with closing(LocalCluster(folder, capacity=capacity)) as cluster:
        answers = cluster.generate(*requests)
    for [event], prompt in zip(answers, PROMPTS, strict=True):
        assert event.exact
        check_greedy(event.token_ids, plain, prompt, 6)


def test_a_lone_decode_never_overflows(tight: LocalCluster, plain: MixtralForCausalLM) -> None:
    """Its experts are all different, so even a capacity of one token is enough."""
    [[event]] = tight.generate(greedy_request("r", [5], 8))
    assert event.exact
    check_greedy(event.token_ids, plain, [5], 8)


def test_a_strict_request_waits_while_an_expert_that_only_its_overflow_needs_still_loads(
    tmp_path: Path,
) -> None:
    save_mixtral(tmp_path, num_local_experts=32)
    capacity, request = CapacityConfig(tokens=1), greedy_request("r", PROMPTS[0], 6)
    with closing(LocalCluster(tmp_path, capacity=capacity)) as loaded:
        [[expected]] = loaded.generate(request)
    asked = {(f.layer_id, e) for f in loaded.transport.frames for e in f.expert_ids}
    late = min(asked - needed(tmp_path, tuple(PROMPTS[0]), 6))
    assert late[0] == 0  # no overflow comes before, so no token of the prompt chooses it
    loading = LocalCluster(tmp_path, limits=Limits(8, 64, 256), threaded=False, capacity=capacity)
    loading.engine.submit(request)
    for missing in (asked, {late}):
        loading.lose(missing)
        go_on(loading)
        assert tokens_of(loading, "r") == []
    loading.lose([])
    go_on(loading)
    [event] = loading.result(request)
    assert (event.token_ids, event.exact) == (expected.token_ids, False)


def test_what_each_expert_had_no_room_for_is_counted(folder: Path, tight: LocalCluster) -> None:
    """Of two equal tokens one gets both experts, and the other is sent on by both."""
    with closing(LocalCluster(folder)) as roomy:
        roomy.generate(greedy_request("alone", [5], 1))
    assert roomy.overflow == tight.overflow == {}
    tight.generate(greedy_request("twice", [5], 1, n=2))
    chosen = {(0, e) for f in roomy.transport.frames if f.layer_id == 0 for e in f.expert_ids}
    assert len(chosen) == 2
    in_first = {key: count for key, count in tight.overflow.items() if key[0] == 0}
    assert in_first == dict.fromkeys(chosen, 1)
    assert {layer_id for layer_id, _ in tight.overflow} == {*roomy.checkpoint.shape.layers}
