"""How held-out text is scored, and how tokens are told apart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from router.workshop.evaluation import (
    expert_shares,
    kind_shares,
    perplexity,
    score,
    source_shares,
    unigram_nats,
)
from router.workshop.kinds import KINDS, token_kind
from router.workshop.settings import TrainingError

L, V = 6, 20
BOS = 0


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=V,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
            bos_token_id=BOS,
        )
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (",", "punctuation"),
        (' "', "punctuation"),
        (" 1947", "numbers"),
        ("3rd", "numbers"),
        (" Moses", "capitals"),
        ("SQL", "capitals"),
        (" the", "words"),
        ("\nand", "words"),
        ("ing", "parts of words"),
        ("é", "parts of words"),
        ("\n\n", "line ends and spaces"),
        (" ", "line ends and spaces"),
        ("\ufffd", "punctuation"),
    ],
)
def test_kind_of_a_token(text: str, kind: str) -> None:
    assert token_kind(text) == kind


def test_unigram_perplexity_of_even_counts_is_the_vocabulary_size() -> None:
    train_ids = torch.arange(10).repeat(5)
    nats = unigram_nats(train_ids, torch.tensor([1, 7]), 10)
    assert perplexity(nats, 2) == pytest.approx(10)


def test_scores_are_those_of_one_window_at_a_time(model: MixtralForCausalLM) -> None:
    """Nats and routes of two texts, against a loop over windows with transformers' own outputs."""
    generator = torch.Generator().manual_seed(1)
    heldout = {
        name: torch.randint(1, V, (length,), generator=generator)
        for name, length in (("one", 20 * L + 5), ("other", L))
    }
    kinds = torch.randint(len(KINDS), (V,), generator=generator)
    kinds[BOS] = len(KINDS)
    scores = score(model, heldout, kinds, L)
    counts = {name: torch.zeros(2, len(KINDS) + 1, 3, dtype=torch.int64) for name in heldout}
    for name, tokens in heldout.items():
        nats = 0.0
        for window in tokens[: len(tokens) // L * L].view(-1, L):
            inputs = torch.cat([torch.tensor([BOS]), window[:-1]])
            with torch.no_grad():
                output = model(inputs[None], output_router_logits=True)
            nats += F.cross_entropy(output.logits[0], window, reduction="sum").item()
            for layer_id, logits in enumerate(output.router_logits):
                for token, chosen in zip(inputs, logits.topk(2).indices, strict=True):
                    counts[name][layer_id, kinds[token], chosen] += 1
        assert scores[name].num_tokens == len(tokens) // L * L
        assert scores[name].nats == pytest.approx(nats, rel=1e-5)
        assert torch.equal(scores[name].counts, counts[name])
    total = counts["one"] + counts["other"]
    expected = total.sum(1) / total.sum((1, 2))[:, None]
    torch.testing.assert_close(torch.tensor(expert_shares(scores)), expected)
    assert source_shares(scores)["other"][0] == pytest.approx(
        (counts["other"][0].sum(0) / (2 * L)).tolist()
    )
    for kind, shares in kind_shares(scores).items():
        cells = total[:, KINDS.index(kind)]
        torch.testing.assert_close(torch.tensor(shares), cells / cells.sum(1, keepdim=True))


def test_a_kind_that_does_not_occur_has_no_share(model: MixtralForCausalLM) -> None:
    kinds = torch.full((V,), KINDS.index("numbers"))
    scores = score(model, {"one": torch.ones(L, dtype=torch.int64)}, kinds, L)
    assert list(kind_shares(scores)) == ["numbers"]
    assert math.isfinite(scores["one"].nats)


def test_text_shorter_than_a_window_is_named(model: MixtralForCausalLM) -> None:
    with pytest.raises(TrainingError, match="brief: 5 held-out tokens are fewer than"):
        score(model, {"brief": torch.ones(5, dtype=torch.int64)}, torch.zeros(V).long(), L)
