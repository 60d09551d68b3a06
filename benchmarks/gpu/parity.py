"""Every family on a device against transformers there: greedy tokens in fp32, distances in bf16.

Tiny random checkpoints, the router and the experts in this process, the real path without Ray. In
fp32 the greedy tokens of a crowd, whose prompts are prefilled in chunks beside decodes, must be
those of transformers. In bf16 roundings differ, and so may a choice between nearly equal experts:
there the log probabilities are to be about as near to fp32's as transformers' bf16 is.

transformers has no Grok-1: an independent implementation takes its place, on the host.

Dimension letters: T tokens of a prompt and its answer, G generated tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from experts.checkpoint.checkpoint import open_checkpoint
from router.engine.scheduling.scheduler import Limits
from router.messages.request import TokenEvent
from router.model.memory import router_sizes
from tests.checkpoints import save_mixtral, transformers_tokens
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import Weights, all_logits, greedy_tokens, save_grok
from tests.local_cluster import LocalCluster, greedy_request

PROMPTS: tuple[tuple[int, ...], ...] = ((5, 9, 7), (8, 2, 6, 3, 4), tuple(range(3, 40)))
GENERATED = 8
LIMITS = Limits(32, 16, 256)
"""So few tokens a step that the last prompt is prefilled in chunks beside the decodes."""
TOP = 20
"""The likeliest tokens of each place, whose log probabilities are compared."""
MAX_DISTANCE, MIN_DISTANCE = 2.5, 0.05
"""How far bf16 may be from fp32: so many times the oracle's distance, or this at least."""


class Oracle(Protocol):
    """A model that shares no code with the router's."""

    def tokens(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """Return the greedy tokens after a prompt, in fp32."""
        ...

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int], dtype: str) -> torch.Tensor:
        """Return the log probabilities [G, V] at the places of an answer, fp32 on the host."""
        ...


class TransformersOracle:
    """transformers' model with eager attention and experts, on a device."""

    def __init__(self, model: Any, device: torch.device) -> None:
        """Take over ``model``, in fp32."""
        self._model = model.to(device)
        self._dtype = "float32"

    def tokens(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """See :class:`Oracle`."""
        return transformers_tokens(self._model, prompt, count)

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int], answer: Sequence[int], dtype: str) -> torch.Tensor:
        """See :class:`Oracle`; once it was asked in bf16, it has fp32 no more."""
        if dtype != self._dtype:
            # Parameters alone, as transformers loads them: the rotary frequencies stay in fp32.
            for parameter in self._model.parameters():
                parameter.data = parameter.data.to(getattr(torch, dtype))
            self._dtype = dtype
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=self._model.device)
        logits = self._model(ids).logits[0, len(prompt) - 1 :]
        return logits.float().cpu().log_softmax(-1)


class GrokOracle:
    """The plain Grok-1 of the tests, on the host."""

    def __init__(self, weights: Weights) -> None:
        """Compute with these weights."""
        self._weights = weights

    def tokens(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """See :class:`Oracle`."""
        return tuple(greedy_tokens(self._weights, list(prompt), count))

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int], dtype: str) -> torch.Tensor:
        """See :class:`Oracle`."""
        weights = {name: one.to(getattr(torch, dtype)) for name, one in self._weights.items()}
        found = all_logits(weights, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
        return found.float().log_softmax(-1)


def _transformers(save: Callable[[Path], Any]) -> Callable[[Path, torch.device], Oracle]:
    return lambda folder, device: TransformersOracle(save(folder), device)


FAMILIES: Mapping[str, Callable[[Path, torch.device], Oracle]] = {
    "mixtral": _transformers(save_mixtral),
    **{name: _transformers(save) for name, save in SAVERS.items()},
    "grok": lambda folder, device: GrokOracle(save_grok(folder)),
}
"""Saves a tiny checkpoint of a family into a folder; returns its oracle, on a device if it can."""


@dataclass(frozen=True, slots=True)
class Parity:
    """A family's comparison.

    ``distance`` is the mean absolute difference of log probabilities at a place between bf16 here
    and the oracle's fp32; ``oracle_distance`` is that between the oracle's own bf16 and its fp32.
    Both are medians of all places, so that a place whose gate chose another expert does not count.
    ``attention`` is the router's in bf16; ``may_read_pages`` says whether the family's sizes let it
    read the cache's pages in place.
    """

    family: str
    tokens: int
    equal_tokens: int
    distance: float
    oracle_distance: float
    attention: str
    may_read_pages: bool

    @property
    def most_distance(self) -> float:
        """The largest distance that is allowed."""
        return max(MIN_DISTANCE, MAX_DISTANCE * self.oracle_distance)

    @property
    def is_kept(self) -> bool:
        """Whether the family computes as its oracle does."""
        return self.equal_tokens == self.tokens and self.distance <= self.most_distance


def compare(
    family: str,
    device: torch.device,
    oracle_device: torch.device | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> Parity:
    """Compare a family's router and experts on ``device`` with its oracle.

    The oracle is on ``oracle_device``, by default the same.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        oracle = FAMILIES[family](folder, oracle_device or device)
        in_fp32, _ = _generate(folder, device, "float32", prompts)
        in_bf16, attention = _generate(folder, device, "bfloat16", prompts)
        checkpoint = open_checkpoint(folder)
        sizes = router_sizes(checkpoint.family, checkpoint.config)
    expected = [oracle.tokens(prompt, GENERATED) for prompt in prompts]
    pairs = [
        pair
        for event, ids in zip(in_fp32, expected, strict=True)
        for pair in zip(event.token_ids, ids, strict=True)
    ]
    answers = [event.token_ids for event in in_bf16]
    exact, theirs = (
        [oracle.logprobs(*pair, dtype) for pair in zip(prompts, answers, strict=True)]
        for dtype in ("float32", "bfloat16")
    )
    distances: list[float] = []
    oracle_distances: list[float] = []
    for event, true, rounded in zip(in_bf16, exact, theirs, strict=True):
        ids = torch.tensor([place.top_ids for place in event.logprobs])
        ours = torch.tensor([place.top_logprobs for place in event.logprobs])
        true = true.gather(1, ids)
        distances += (ours - true).abs().mean(1).tolist()
        oracle_distances += (rounded.gather(1, ids) - true).abs().mean(1).tolist()
    return Parity(
        family,
        len(pairs),
        sum(ours == theirs for ours, theirs in pairs),
        statistics.median(distances),
        statistics.median(oracle_distances),
        attention,
        sizes.reads_pages(torch.bfloat16.itemsize),
    )


def _generate(
    folder: Path, device: torch.device, dtype: str, prompts: Sequence[Sequence[int]]
) -> tuple[list[TokenEvent], str]:
    """Return the greedy answers to all prompts, asked at once, and the router's attention.

    In bf16 the answers have log probabilities.
    """
    options: dict[str, Any] = {} if dtype == "float32" else {"logprobs": TOP}
    cluster = LocalCluster(folder, limits=LIMITS, dtype=dtype, device=device, experts_device=device)
    try:
        requests = [
            greedy_request(f"r{i}", prompt, GENERATED, **options)
            for i, prompt in enumerate(prompts)
        ]
        answers = [event for [event] in cluster.generate(*requests)]
        return answers, cluster.model.attention.name
    finally:
        cluster.close()


def run(device: torch.device, families: Sequence[str] = tuple(FAMILIES)) -> list[dict[str, Any]]:
    """Compare families one after another, in a process of their own; returns plain data."""
    torch.set_num_threads(1)  # the models are tiny, and two threads compute
    transformers.utils.logging.disable_progress_bar()
    found = []
    for family in families:
        print(family, flush=True)
        found.append(compare(family, device))
    return [
        asdict(one) | {"most_distance": one.most_distance, "is_kept": one.is_kept} for one in found
    ]
