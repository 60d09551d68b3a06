"""A checkpoint whose tokens choose their experts, so that a benchmark can steer the load.

A token's embedding is a direction of its own, and attention and emulated experts add nothing to it:
so the gate of every layer sees which token it is, and the head knows which comes next.

The first tokens repeat themselves; the expert of each is in every layer on the same actor, another
one for each token in turn. Beside these there is one cycle of tokens for all streams, in which
experts are as frequent as Zipf says, and the same actor begins with the most popular one of every
layer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

EXPERTS = 8
LAYERS = 2
ZIPF_CYCLE = 48
ZIPF_BEGIN = 257
"""After the tokens of a byte-level tokenizer."""
VOCAB = ZIPF_BEGIN + ZIPF_CYCLE
HIDDEN = 312
HEADS = 4
MAX_LENGTH = 4096
STRENGTH = 8.0


def own_token(number: int) -> int:
    """Return a token that repeats itself; neighbouring numbers have experts on other actors."""
    return 1 + number


def zipf_token(place: int) -> int:
    """Return the token at a place of Zipf's cycle, which goes on for ever."""
    return ZIPF_BEGIN + place % ZIPF_CYCLE


def zipf_numbers(total: int, kinds: int) -> list[int]:
    """Return how many of ``total`` are of each kind, the k-th being as frequent as 1/k.

    What is left after rounding down goes to those that lost most by it.
    """
    weights = [1 / (kind + 1) for kind in range(kinds)]
    exact = [total * weight / sum(weights) for weight in weights]
    numbers = [int(one) for one in exact]
    by_loss = sorted(range(kinds), key=lambda kind: numbers[kind] - exact[kind])
    for kind in by_loss[: total - sum(numbers)]:
        numbers[kind] += 1
    return numbers


@cache
def _zipf_ranks(layer: int) -> list[int]:
    """Return the rank of the expert that each place of Zipf's cycle takes in a layer."""
    numbers = zipf_numbers(ZIPF_CYCLE, EXPERTS)
    ranks = [rank for rank, number in enumerate(numbers) for _ in range(number)]
    random.Random(f"zipf {layer}").shuffle(ranks)
    return ranks


def next_token(token: int) -> int:
    """Return the token that the model says after this one."""
    return token if token < ZIPF_BEGIN else zipf_token(token - ZIPF_BEGIN + 1)


def expert_of(layer: int, token: int) -> int:
    """Return the expert that a layer's gate gives a token to.

    Expert e of layer l begins at actor (e + l) mod A, so the layer counts against the token.
    """
    if token >= ZIPF_BEGIN:
        return (_zipf_ranks(layer)[token - ZIPF_BEGIN] - layer) % EXPERTS
    return (token - 1 - layer) % EXPERTS


def save(folder: Path) -> None:
    """Save the checkpoint, in fp32, with a byte-level tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    from benchmarks.common import save_tokenizer

    logging.disable_progress_bar()
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for name, row, column in _ones():
            model.get_parameter(name)[row, column] = STRENGTH
    model.save_pretrained(folder)
    save_tokenizer(folder)


def _ones() -> Iterator[tuple[str, int, int]]:
    """Yield parameter, row and column of all that is not zero but the norms."""
    for token in range(VOCAB):
        yield "model.embed_tokens.weight", token, token
        if token:
            yield "lm_head.weight", next_token(token), token
            for layer in range(LAYERS):
                yield f"model.layers.{layer}.mlp.gate.weight", expert_of(layer, token), token
