"""Measures how well a model predicts held-out text, and which tokens each expert takes.

The experts of a token are the experts at its input position.
L: sequence length, V: vocabulary size, E: experts, k: experts per token, K: kinds of token.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from router.workshop.corpus import windows
from router.workshop.kinds import KINDS, token_kind
from router.workshop.settings import TrainingError

EVALUATION_BATCH = 16
_NO_KIND = len(KINDS)


@dataclass(frozen=True)
class SourceScore:
    """The score of a text's held-out tokens: their number, their loss in nats, their experts.

    `counts` [layers][K + 1][E] are numbers of assignments. The last kind is the special tokens that
    begin and end a document.
    """

    num_tokens: int
    nats: float
    counts: torch.Tensor


def unigram_nats(train: torch.Tensor, heldout: torch.Tensor, vocab_size: int) -> float:
    """Return the nats of held-out ids under the counts of the V training ids, each plus one."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return -log_probabilities[heldout].sum().item()


def kinds_of_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> torch.Tensor:
    """Return the index in KINDS of each token id, K for special tokens: int64 [V]."""
    special = set(tokenizer.all_special_ids)
    return torch.tensor(
        [
            _NO_KIND if token_id in special else KINDS.index(token_kind(tokenizer.decode(token_id)))
            for token_id in range(vocab_size)
        ]
    )


def score(
    model: MixtralForCausalLM,
    heldout: Mapping[str, torch.Tensor],
    kinds: torch.Tensor,
    sequence_length: int,
) -> dict[str, SourceScore]:
    """Score each text's held-out ids in whole windows of L without overlap, each after bos.

    Raises TrainingError when a text is shorter than a window.
    """
    model.eval()
    scores = {}
    for name, tokens in heldout.items():
        starts = torch.arange(0, len(tokens) - sequence_length + 1, sequence_length)
        if not len(starts):
            raise TrainingError(
                f"{name}: {len(tokens)} held-out tokens are fewer than sequence_length "
                f"{sequence_length}; give more text or a smaller holdout_every_blocks"
            )
        scores[name] = _score(model, tokens, starts, kinds, sequence_length)
    return scores


def _score(
    model: MixtralForCausalLM,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    kinds: torch.Tensor,
    sequence_length: int,
) -> SourceScore:
    num_experts = model.config.num_local_experts
    num_cells = (len(KINDS) + 1) * num_experts
    counts = torch.zeros(model.config.num_hidden_layers, num_cells, dtype=torch.int64)
    nats = 0.0
    with torch.inference_mode(), _routes(model) as routes:
        for batch in starts.split(EVALUATION_BATCH):
            inputs, targets = windows(tokens, batch, sequence_length, model.config.bos_token_id)
            logits = model(input_ids=inputs, use_cache=False).logits
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            first_cells = kinds[inputs.flatten()] * num_experts
            for layer_id, topk_ids in enumerate(routes):  # [tokens, k]
                cells = first_cells[:, None] + topk_ids
                counts[layer_id] += torch.bincount(cells.flatten(), minlength=num_cells)
    shape = (len(counts), len(KINDS) + 1, num_experts)
    return SourceScore(len(starts) * sequence_length, nats, counts.view(shape))


@contextmanager
def _routes(model: MixtralForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Yield a list that holds each layer's topk_ids of the latest forward pass."""
    layers = model.model.layers
    routes = [torch.empty(0, dtype=torch.int64) for _ in layers]

    def keep(layer_id: int, _gate: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        routes[layer_id] = output[2]

    with ExitStack() as hooks:
        for layer_id, layer in enumerate(layers):
            hooks.enter_context(layer.mlp.gate.register_forward_hook(partial(keep, layer_id)))
        yield routes


def perplexity(nats: float, num_tokens: int) -> float:
    """Return the perplexity per token of a text with this loss."""
    return math.exp(nats / num_tokens)


def expert_shares(scores: Mapping[str, SourceScore]) -> list[list[float]]:
    """Return each expert's share of a layer's assignments, [layers][E]."""
    return _shares(_total(scores).sum(1))


def kind_shares(scores: Mapping[str, SourceScore]) -> dict[str, list[list[float]]]:
    """Return, for each kind that occurs, each expert's share of its assignments, [layers][E]."""
    total = _total(scores)
    return {
        kind: _shares(total[:, index]) for index, kind in enumerate(KINDS) if total[:, index].any()
    }


def source_shares(scores: Mapping[str, SourceScore]) -> dict[str, list[list[float]]]:
    """Return, for each text, each expert's share of its assignments, [layers][E]."""
    return {name: _shares(text_score.counts.sum(1)) for name, text_score in scores.items()}


def _total(scores: Mapping[str, SourceScore]) -> torch.Tensor:
    return torch.stack([text_score.counts for text_score in scores.values()]).sum(0)


def _shares(counts: torch.Tensor) -> list[list[float]]:
    return (counts / counts.sum(dim=1, keepdim=True)).tolist()
