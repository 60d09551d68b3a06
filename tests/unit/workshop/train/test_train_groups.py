"""GShard's groups, capacity and second expert by chance, while training.

The oracle goes through a group one choice at a time. T: tokens, k: experts per token.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig

from tests.unit.workshop.train.training_runs import tiny_settings, write_grammar
from workshop.train.gating import TrainingGate, capacity_of, second_by_chance, within_capacity
from workshop.train.run import Watcher, train
from workshop.train.settings import GatingSettings, GroupSettings, TrainingConfig
from workshop.train.trainer import StepReport

NUM_EXPERTS = 4


def oracle(
    ids: list[list[int]], sent: list[list[bool]], group_tokens: int, capacity: int
) -> list[list[bool]]:
    fits = [[False] * len(row) for row in ids]
    for start in range(0, len(ids), group_tokens):
        counts: Counter[int] = Counter()
        for rank in range(len(ids[0])):
            for token in range(start, start + group_tokens):
                if sent[token][rank] and counts[ids[token][rank]] < capacity:
                    counts[ids[token][rank]] += 1
                    fits[token][rank] = True
    return fits


@settings(max_examples=100)
@given(
    groups=st.integers(1, 3),
    group_tokens=st.integers(1, 6),
    k=st.integers(1, 3),
    capacity=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_what_finds_room_is_what_the_oracle_lets_in(
    groups: int, group_tokens: int, k: int, capacity: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups * group_tokens, NUM_EXPERTS, generator=generator)
    ids = logits.topk(k).indices
    sent = torch.rand(ids.shape, generator=generator) < 0.7
    fits = within_capacity(ids, sent, group_tokens, capacity, NUM_EXPERTS)
    assert fits.tolist() == oracle(ids.tolist(), sent.tolist(), group_tokens, capacity)


@pytest.mark.parametrize(
    ("group_tokens", "k", "factor", "expected"), [(8, 2, 1.0, 4), (8, 2, 1.1, 5), (1, 1, 0.1, 1)]
)
def test_the_capacity_is_a_multiple_of_an_equal_share(
    group_tokens: int, k: int, factor: float, expected: int
) -> None:
    assert capacity_of(group_tokens, k, NUM_EXPERTS, factor) == expected


@pytest.mark.parametrize("second", [0.05, 0.3, 0.5])
def test_the_second_expert_is_asked_as_often_as_twice_its_weight(second: float) -> None:
    draws = 20_000
    weights = torch.tensor([[1 - second, second]]).repeat(draws, 1)
    sent = second_by_chance(weights, torch.Generator().manual_seed(0))
    assert sent[:, 0].all()
    # 20,000 draws: a standard error of at most 0.0036.
    assert sent[:, 1].double().mean().item() == pytest.approx(min(1.0, 2 * second), abs=0.015)


def gate(groups: GroupSettings | None) -> TrainingGate:
    config = MixtralConfig(hidden_size=8, num_local_experts=NUM_EXPERTS, num_experts_per_tok=2)
    gating = GatingSettings(noisy=False, importance_weight=0, load_weight=0, groups=groups)
    built = TrainingGate(config, gating, torch.Generator().manual_seed(0))
    built.weight.data = torch.randn(NUM_EXPERTS, 8, generator=torch.Generator().manual_seed(1))
    return built


HIDDEN = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))


def test_a_gate_weighs_what_finds_no_room_with_zero_and_the_rest_as_ever() -> None:
    _, plain, ids = gate(None)(HIDDEN)
    tight = gate(GroupSettings(tokens=6, capacity_factor=0.5))
    _, weights, same_ids = tight(HIDDEN)
    assert torch.equal(ids, same_ids)
    capacity = capacity_of(6, 2, NUM_EXPERTS, 0.5)
    fits = torch.tensor(oracle(ids.tolist(), [[True] * 2] * 12, 6, capacity))
    assert not fits.all()
    assert torch.equal(weights, torch.where(fits, plain, 0.0))
    assert tight.overflow_share == pytest.approx(1 - fits.double().mean().item())


def test_with_room_for_all_and_when_serving_nothing_changes() -> None:
    roomy = gate(GroupSettings(tokens=6, capacity_factor=8))
    assert torch.equal(roomy(HIDDEN)[1], gate(None)(HIDDEN)[1])
    assert roomy.overflow_share == 0
    tight = gate(GroupSettings(tokens=6, capacity_factor=0.1, random_second=True)).eval()
    assert torch.equal(tight(HIDDEN)[1], gate(None).eval()(HIDDEN)[1])


@pytest.mark.usefixtures("one_thread")
def test_a_run_in_groups_tells_its_overflow_and_its_card_how(tmp_path: Path) -> None:
    raw = tiny_settings(steps=3)
    raw["gating"]["groups"] = {"tokens": 32, "capacity_factor": 0.75, "random_second": True}
    reports: list[StepReport] = []
    text = write_grammar(tmp_path / "grammar.txt")
    out = tmp_path / "out"
    train(TrainingConfig.model_validate(raw), [text], out, watcher=Watcher(on_step=reports.append))
    assert len(reports) == 3
    assert all(0 < report.overflow_share < 1 for report in reports)
    card = (out / "README.md").read_text()
    assert "in groups of 32 tokens a capacity of 0.75 equal shares, the second expert by" in card
