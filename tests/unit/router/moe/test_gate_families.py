"""The gate in every family's block: whole, and without some experts.

The oracle of the latter is the family's formula written out, a token at a time.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from router.model.parts import take_gate
from router.moe.capacity import within_capacity
from router.moe.gate import Choice, Gate
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS

Weights = dict[int, float]
Formula = Callable[[Any, torch.Tensor, Collection[int], Collection[int]], Weights]
"""From (block, hidden state [H], experts in line, experts that live) to weights by expert."""


def softmax_of_all(renormalises: bool) -> Formula:
    """Shares of all experts; of the chosen ones where the family renormalises."""

    def formula(
        block: Any, hidden: torch.Tensor, line: Collection[int], live: Collection[int]
    ) -> Weights:
        gate = block.router.layer if hasattr(block, "router") else block.gate
        shares = (gate.weight @ hidden).softmax(-1).tolist()
        chosen = sorted(line, key=lambda e: -shares[e])
        chosen = [e for e in chosen[: top_k(block)] if e in live]
        total = sum(shares[e] for e in chosen) if renormalises else 1.0
        return {e: shares[e] / total for e in chosen}

    return formula


def softmax_of_the_chosen(
    block: Any, hidden: torch.Tensor, line: Collection[int], live: Collection[int]
) -> Weights:
    """GPT-OSS: the largest logits, and the shares among them."""
    logits = (block.router.weight @ hidden + block.router.bias).tolist()
    chosen = sorted(line, key=lambda e: -logits[e])[: block.router.top_k]
    powers = {e: math.exp(logits[e]) for e in chosen if e in live}
    return {e: power / sum(powers.values()) for e, power in powers.items()}


def in_groups(scores: list[float], line: Collection[int], gate: Any, best: int) -> list[int]:
    """Return who is chosen of the groups whose ``best`` best sum up to most."""
    size = len(scores) // gate.num_group
    least = min(scores) - 1
    worth = [s if e in line else least for e, s in enumerate(scores)]
    groups = [range(g * size, (g + 1) * size) for g in range(gate.num_group)]
    groups.sort(key=lambda group: -sum(sorted(worth[e] for e in group)[-best:]))
    within = [e for group in groups[: gate.topk_group] for e in group if e in line]
    return sorted(within, key=lambda e: -scores[e])[: gate.top_k]


def deepseek_v2(
    block: Any, hidden: torch.Tensor, line: Collection[int], live: Collection[int]
) -> Weights:
    """Groups by their best share; no normalisation, a factor."""
    shares = (block.gate.weight @ hidden).softmax(-1).tolist()
    chosen = in_groups(shares, line, block.gate, 1)
    return {e: shares[e] * block.gate.routed_scaling_factor for e in chosen if e in live}


def deepseek_v3(
    block: Any, hidden: torch.Tensor, line: Collection[int], live: Collection[int]
) -> Weights:
    """Groups by their best two, corrected for the choice alone; normalised, a factor."""
    shares = (block.gate.weight @ hidden).sigmoid()
    corrected = (shares + block.gate.e_score_correction_bias).tolist()
    chosen = [e for e in in_groups(corrected, line, block.gate, 2) if e in live]
    total = sum(float(shares[e]) for e in chosen)
    return {e: float(shares[e]) / total * block.gate.routed_scaling_factor for e in chosen}


def top_k(block: Any) -> int:
    return int(block.top_k if hasattr(block, "top_k") else block.gate.top_k)


CASES: list[tuple[str, dict[str, Any], Formula]] = [
    ("qwen2_moe", {}, softmax_of_all(False)),
    ("qwen2_moe", {"norm_topk_prob": True}, softmax_of_all(True)),
    ("qwen3_moe", {}, softmax_of_all(True)),
    ("olmoe", {}, softmax_of_all(False)),
    ("dbrx", {}, softmax_of_all(True)),
    ("gpt_oss", {}, softmax_of_the_chosen),
    ("deepseek_v2", {}, deepseek_v2),
    ("deepseek_v3", {}, deepseek_v3),
]


class Recorder(nn.Module):
    """Takes the place of a block's experts, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.given = list(given)
        return given[0]


def block_of(folder: Path, model: Any) -> tuple[Any, Checkpoint, Gate]:
    """Return transformers' block, the checkpoint, and our gate of the block's weights."""
    checkpoint = open_checkpoint(folder)
    block = next(b for b in model.modules() if hasattr(b, "experts"))
    family = checkpoint.family
    spec = family.gate(checkpoint.config)
    top_k = checkpoint.shape.num_experts_per_tok
    return block, checkpoint, take_gate(copy.deepcopy(block), family.gate_module, spec, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted([*SAVERS, "mixtral"]))
@torch.inference_mode()
def test_a_gate_gives_a_blocks_experts_what_transformers_does(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = (SAVERS | {"mixtral": save_mixtral})[name](tmp_path, dtype=dtype)
    block, checkpoint, gate = block_of(tmp_path, model)
    block.experts = Recorder()
    block.float()  # exact for weights of half precision
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    for num_tokens in (1, 2, 37):
        hidden = torch.randn(1, num_tokens, checkpoint.shape.hidden_size, dtype=dtype)
        block(hidden.float())
        rows, ids, weights = block.experts.given
        assert torch.equal(rows.view(hidden.shape), hidden.float())
        own_ids, own_weights = gate.choose(hidden[0])
        assert torch.equal(own_ids.sort().values, ids.sort().values)
        for theirs, own in ((ids, own_ids), (weights, own_weights)):
            assert own.shape == theirs.shape
        expected = torch.zeros(num_tokens, checkpoint.shape.num_experts).scatter_(1, ids, weights)
        got = torch.zeros_like(expected).scatter_(1, own_ids, own_weights.float())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "changes", "formula"), CASES)
@torch.inference_mode()
def test_a_gate_without_some_experts(
    tmp_path: Path, name: str, changes: dict[str, Any], formula: Formula
) -> None:
    model = SAVERS[name](tmp_path, **changes)
    block, checkpoint, gate = block_of(tmp_path, model)
    num_experts = checkpoint.shape.num_experts
    hidden = torch.randn(40, checkpoint.shape.hidden_size)
    everyone = torch.ones(40, num_experts, dtype=torch.bool)
    own, _ = gate.choose(hidden)
    for lost in ([], [0], [1, 2, 5], list(range(num_experts - 1))):
        live = set(range(num_experts)) - set(lost)
        for contract in ("next_expert", "drop"):
            allowed = everyone.clone()
            allowed[:, lost] = False
            if contract == "drop":
                allowed &= torch.zeros_like(allowed).scatter(1, own, True)
            ids, weights = gate.choose(hidden, allowed)
            for row in range(len(hidden)):
                line = live if contract == "next_expert" else range(num_experts)
                expected = formula(block, hidden[row], line, live)
                pairs = zip(ids[row].tolist(), weights[row].tolist(), strict=True)
                got = {e: w for e, w in pairs if w}
                assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", sorted(SAVERS))
@pytest.mark.parametrize("capacity", [1, 9, 40])
@torch.inference_mode()
def test_a_capacity_holds_and_no_room_is_left_that_someone_lacks(
    tmp_path: Path, name: str, capacity: int
) -> None:
    model = SAVERS[name](tmp_path)
    _, checkpoint, gate = block_of(tmp_path, model)
    num_experts, size = checkpoint.shape.num_experts, checkpoint.shape.hidden_size
    hidden = torch.randn(50, size) + 2 * torch.randn(size)  # many of one mind
    ids, weights = gate.choose(hidden)
    own = Choice(ids.numpy(), weights)
    placed = within_capacity(
        own, capacity, np.zeros(num_experts, bool), partial(gate.choose_anew, hidden)
    )
    pairs = np.arange(ids.numel()) if placed.choice.pairs is None else placed.choice.pairs
    has = [set[int]() for _ in hidden]
    for pair in pairs:
        has[pair // ids.shape[1]].add(int(placed.choice.ids.flat[pair]))
    counts = Counter(expert for one in has for expert in one)
    assert len(pairs) == counts.total()  # nobody has an expert twice
    assert max(counts.values()) <= capacity
    full = {expert for expert, count in counts.items() if count == capacity}
    for chosen, one in zip(ids.tolist(), has, strict=True):
        assert set(chosen) - one <= full
        assert len(one) == ids.shape[1] or set(range(num_experts)) - one <= full
    moved = [t for t, one in enumerate(has) if one != set(ids[t].tolist())]
    assert placed.rows.tolist() == moved
    assert (len(moved) > 0) == (int(placed.overflow.sum()) > 0)
    assert moved or capacity == 40
