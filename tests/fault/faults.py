"""What the fault tests share: streams under way, and signals to processes of the cluster only."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
from ray.util import list_named_actors

from router.client import Sampling
from tests.cluster_fixture import (
    RANDOM,
    ServedCluster,
    StreamReader,
    greedy,
    prompt_of,
    wait_until,
)
from tests.fault.signals import is_stopped, kill, let_go, named_pids, stopped

__all__ = [
    "actor_names", "check_forms", "constrained_tokens", "drawn_experts", "expected_tokens",
    "is_stopped", "kill", "let_go", "named_pids", "start_constrained", "start_streams", "stopped",
    "wait_stalled",
]  # fmt: skip

STREAMS, LENGTH, BEFORE = 8, 200, 3
"""Streams at once, tokens of each, and how many of them come before the fault."""
STALL_S = 0.5
"""A stream that has no token for so long is taken to wait for an expert."""

PROMPTS = [prompt_of(5 + 5 * seed, 1000 + seed) for seed in range(STREAMS)]
SHARED = prompt_of(160, 7)
SHARED_PROMPTS = [[*SHARED, 2 + number] for number in range(4)]
"""Prompts with one long beginning, whose pages of the cache they share."""
WORDS = {
    "type": "array",
    "items": {"enum": ["ab", "cd", "ef"]},
    "minItems": 30,
    "maxItems": 30,
}
FORMS: list[dict[str, Any]] = [
    {"json": WORDS, "disable_any_whitespace": True},
    {"regex": "([ab][cd]){60}"},
]
"""Forms of long answers with a choice at many steps, which end before :data:`LENGTH`."""


def actor_names(app: str) -> set[str]:
    """Return the Ray names of an application's expert actors that live."""
    names = (entry["name"] for entry in list_named_actors(all_namespaces=True))
    return {name for name in names if name.startswith(f"expertmesh:{app}:")}


def start_streams(
    served: ServedCluster, model: str = RANDOM, timeout_s: float = 60.0, times: int = 1
) -> list[StreamReader]:
    """Return greedy streams that have begun and are far from their end.

    They are those of :data:`PROMPTS`, all of these ``times`` over.
    """
    expected_tokens(served)  # nothing slow may come between their start and the fault
    sampling = greedy(LENGTH)
    prompts = PROMPTS * times
    streams = [StreamReader(served.client, p, sampling, model, timeout_s) for p in prompts]
    for stream in streams:
        stream.wait_tokens(BEFORE)
    return streams


def constrained(seed: int, form: dict[str, Any]) -> Sampling:
    """Return the sampling of an answer of a form, drawn by the seed."""
    return Sampling(max_tokens=LENGTH, temperature=1.0, seed=seed, structured_outputs=form)


def constrained_tokens(served: ServedCluster) -> list[tuple[int, ...]]:
    """Return the tokens of the answers of :data:`FORMS` while nothing disturbs them."""
    samplings = [constrained(seed, form) for seed, form in enumerate(FORMS)]
    return served.crowd(RANDOM, PROMPTS[: len(FORMS)], samplings)


def start_constrained(served: ServedCluster) -> list[StreamReader]:
    """Return streams of the same answers that have begun and are far from their end."""
    streams = [
        StreamReader(served.client, prompt, constrained(seed, form), RANDOM)
        for seed, (prompt, form) in enumerate(zip(PROMPTS, FORMS, strict=False))
    ]
    for stream in streams:
        stream.wait_tokens(BEFORE)
    return streams


def check_forms(streams: Sequence[StreamReader]) -> None:
    """Check that whole answers have their forms."""
    words, letters = ("".join(piece.text for piece in stream.pieces) for stream in streams)
    jsonschema.validate(json.loads(words), WORDS)
    assert re.fullmatch(FORMS[1]["regex"], letters)


def expected_tokens(served: ServedCluster) -> list[tuple[int, ...]]:
    """Return what transformers makes of :data:`PROMPTS` with the random model."""
    return [served.expected(prompt, LENGTH) for prompt in PROMPTS]


def drawn_experts(served: ServedCluster, num_tokens: int) -> np.ndarray:
    """Return experts [tokens, MoE layers, K] that no gate of the random model would choose."""
    [info] = served.client.model_info(RANDOM)
    sizes = num_tokens, len(info.moe_layers), info.num_experts
    order = np.random.default_rng(5).random(sizes).argsort(axis=2)
    return order[:, :, : info.num_experts_per_tok].astype(np.uint8)


def longest_gap_s(streams: Sequence[StreamReader]) -> float:
    """Return the longest time that any of the streams had to wait for its next tokens."""
    return max(
        after - before
        for stream in streams
        for before, after in itertools.pairwise(stream.arrived_s)
    )


def wait_stalled(streams: Sequence[StreamReader]) -> None:
    """Wait until none of the streams, which must go on, has had a token for a while."""
    last, since_s = -1, 0.0

    def stalled() -> bool:
        nonlocal last, since_s
        total = sum(len(stream.token_ids) for stream in streams)
        if total != last:
            last, since_s = total, time.monotonic()
        return time.monotonic() - since_s > STALL_S

    wait_until(stalled, "the streams stall", 10)
    assert not any(stream.ended for stream in streams)
