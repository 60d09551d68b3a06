"""The most tokens per second that this design can have on a machine, by the machine's limits.

A router computes a layer's dense part on its thread, sends rows to its actors, and waits for them;
each actor computes on a thread of its own. So a step's dense parts, its experts and its messages
come one after another:

    step = layers · hop + dense part on one thread + experts on the actors' threads

Each part takes as long as reading its weights or as computing with them, whichever is longer. The
cache of keys and values is not counted, nor any work of a layer beyond its products, nor uneven
loads of actors when there are many rows. Letters: E experts a layer, K of them for a token, A
actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import comb

from benchmarks.limits import Limits

VALUE_BYTES = {"float32": 4, "bfloat16": 2}
"""The bytes of a weight, by dtype."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that a step reads: ``dense`` in all layers and the head, ``expert`` in one."""

    layers: int
    dense: int
    expert: int
    num_experts: int
    num_experts_per_tok: int

    @property
    def of_a_token(self) -> int:
        """The weights that one token touches."""
        return self.dense + self.layers * self.num_experts_per_tok * self.expert


def weights_of(sizes: Mapping[str, int]) -> Weights:
    """Return the weights of a Mixtral, without the embedding, of which a token reads one row."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_size = hidden // heads * sizes["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * kv_size
    layer = attention + 2 * hidden + sizes["num_local_experts"] * hidden
    layers = sizes["num_hidden_layers"]
    return Weights(
        layers,
        layers * layer + hidden + sizes["vocab_size"] * hidden,
        3 * hidden * sizes["intermediate_size"],
        sizes["num_local_experts"],
        sizes["num_experts_per_tok"],
    )


def shares(experts_of: tuple[int, ...], chosen: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield how many of the ``chosen`` experts each actor has, and how probable that is.

    ``experts_of`` has the number of experts of each actor; each choice is as probable as another.
    """
    total = comb(sum(experts_of), chosen)

    def split(number: int, left: int) -> Iterator[tuple[tuple[int, ...], int]]:
        if number == len(experts_of):
            if left == 0:
                yield (), 1
            return
        for count in range(min(left, experts_of[number]) + 1):
            for rest, ways in split(number + 1, left - count):
                yield (count, *rest), comb(experts_of[number], count) * ways

    for counts, ways in split(0, chosen):
        yield counts, ways / total


def touched(num_experts: int, chosen: int, streams: int) -> float:
    """Return how many of a layer's experts so many tokens need, on average."""
    return num_experts * (1 - (1 - chosen / num_experts) ** streams)


def tokens_per_s(weights: Weights, limits: Limits, actors: int, streams: int, dtype: str) -> float:
    """Return the bound for a number of streams, with weights of a dtype.

    Arithmetic in 16 bits may widen the weights and be that of fp32, so the faster rate counts.
    """
    value_bytes = VALUE_BYTES[dtype]
    rate = max(limits.flop_per_s["float32"], limits.flop_per_s[dtype])
    cores = min(actors, limits.threads)
    dense_s = max(
        weights.dense * value_bytes / limits.one_thread_bytes_per_s,
        2 * weights.dense * streams / rate,
    )
    expert_flop = 2 * weights.expert * weights.num_experts_per_tok * streams
    if streams == 1:
        layer_s = _one_token_s(weights, limits, actors, value_bytes, rate)
    else:
        count = touched(weights.num_experts, weights.num_experts_per_tok, streams)
        layer_s = max(
            count * weights.expert * value_bytes / _reading(limits, cores),
            expert_flop / (cores * rate),
        )
    return streams / (dense_s + weights.layers * (layer_s + limits.hop_s))


def _one_token_s(
    weights: Weights, limits: Limits, actors: int, value_bytes: int, rate: float
) -> float:
    """Return how long the experts of one token take in a layer, on average over its choices.

    Actors without a chosen expert idle; the others share the bandwidth, and the busiest decides.
    """
    held = tuple(len(range(actor, weights.num_experts, actors)) for actor in range(actors))
    mean_s = 0.0
    for counts, probability in shares(held, weights.num_experts_per_tok):
        busy = min(sum(count > 0 for count in counts), limits.threads)
        each = _reading(limits, busy) / busy
        one_s = max(weights.expert * value_bytes / each, 2 * weights.expert / rate)
        mean_s += probability * max(counts) * one_s
    return mean_s


def _reading(limits: Limits, cores: int) -> float:
    """Return the bytes per second that so many cores read together."""
    return min(cores * limits.one_thread_bytes_per_s, limits.all_threads_bytes_per_s)
