"""A checkpoint whose tokens say themselves which expert takes them, so that load can be steered.

A token's embedding is a direction of its own, and attention and emulated experts add nothing to it:
so the gate of every layer sees which token it is, and the head which comes next. Every stream has
tokens of its own, so that a row tells whose it is wherever it is seen.

- ``own``: each stream stays at one token, whose expert is in every layer on the same actor, another
  one for each stream in turn.
- ``one``: as that, but the same expert for all streams.
- ``spread``: a stream goes through a cycle of tokens, each of which takes any expert in each layer.

Beside these there is one cycle for all streams, in which experts are as frequent as Zipf says, and
the same actor begins with the most popular one of every layer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

Traffic = Literal["own", "one", "spread"]

STREAMS = 16
EXPERTS = 8
LAYERS = 2
CYCLE = 14
ZIPF_CYCLE = 48
ZIPF_BEGIN = 1 + STREAMS * (2 + CYCLE)
VOCAB = ZIPF_BEGIN + ZIPF_CYCLE
HIDDEN = 312
HEADS = 4
MAX_LENGTH = 4096
STRENGTH = 8.0


def first_token(traffic: Traffic, stream: int) -> int:
    """Return the token that a stream's prompt consists of."""
    begins = {"own": 1, "one": 1 + STREAMS, "spread": 1 + 2 * STREAMS}
    return begins[traffic] + stream * (CYCLE if traffic == "spread" else 1)


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


def stream_of(token: int) -> int:
    """Return the stream that a token belongs to, if it is none of Zipf's."""
    place = token - 1
    return place % STREAMS if place < 2 * STREAMS else (place - 2 * STREAMS) // CYCLE


def next_token(token: int) -> int:
    """Return the token that the model says after this one."""
    begin = first_token("spread", 0)
    if token < begin:
        return token
    if token >= ZIPF_BEGIN:
        return zipf_token(token - ZIPF_BEGIN + 1)
    cycle, place = divmod(token - begin, CYCLE)
    return begin + cycle * CYCLE + (place + 1) % CYCLE


def expert_of(layer: int, token: int) -> int:
    """Return the expert that a layer's gate gives a token to.

    Expert e of layer l begins at actor (e + l) mod A, so that ``own`` goes against the layer.
    """
    if token < first_token("one", 0):
        return (stream_of(token) - layer) % EXPERTS
    if token < first_token("spread", 0):
        return -layer % EXPERTS
    if token >= ZIPF_BEGIN:
        return (_zipf_ranks(layer)[token - ZIPF_BEGIN] - layer) % EXPERTS
    return random.Random(f"{layer} {token}").randrange(EXPERTS)


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
