"""How held-out text is scored."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from workshop.evaluate.perplexity import together
from workshop.train.corpus import score, unigram_nats
from workshop.train.settings import TrainingError

L, V = 6, 20
BOS = 0


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3,
        "num_experts_per_tok": 2, "bos_token_id": BOS,
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**sizes))


def test_unigram_perplexity_of_even_counts_is_the_vocabulary_size() -> None:
    train_ids = torch.arange(10).repeat(5)
    nats = unigram_nats(train_ids, torch.tensor([1, 7]), 10)
    assert math.exp(nats / 2) == pytest.approx(10)


def test_scores_are_those_of_one_window_at_a_time(model: MixtralForCausalLM) -> None:
    """Nats and routes of two texts, against a loop over windows with transformers' own outputs."""
    generator = torch.Generator().manual_seed(1)
    heldout = {
        name: torch.randint(1, V, (length,), generator=generator)
        for name, length in (("one", 20 * L + 5), ("other", L))
    }
    scores = score(model, heldout, L)
    total = torch.zeros(2, 3, dtype=torch.int64)
    for name, tokens in heldout.items():
        nats, counts = 0.0, torch.zeros(2, 3, dtype=torch.int64)
        for window in tokens[: len(tokens) // L * L].view(-1, L):
            inputs = torch.cat([torch.tensor([BOS]), window[:-1]])
            with torch.no_grad():
                output = model(inputs[None], output_router_logits=True)
            nats += F.cross_entropy(output.logits[0], window, reduction="sum").item()
            for layer_id, logits in enumerate(output.router_logits):
                counts[layer_id] += torch.bincount(logits.topk(2).indices.flatten(), minlength=3)
        figures = scores[name].figures()
        assert figures.tokens == len(tokens) // L * L
        assert figures.nats == pytest.approx(nats, rel=1e-5)
        for layer, found in zip(figures.experts, counts, strict=True):
            assert layer.shares == pytest.approx((found / found.sum()).tolist())
        total += counts
    whole = together([*scores.values()])
    expected = total / total.sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor([e.shares for e in whole.experts]), expected)


def test_text_shorter_than_a_window_is_named(model: MixtralForCausalLM) -> None:
    with pytest.raises(TrainingError, match="brief: 5 held-out tokens are fewer than"):
        score(model, {"brief": torch.ones(5, dtype=torch.int64)}, L)
