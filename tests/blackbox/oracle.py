"""What one process computes of a request: no Ray, no network, nobody that dies.

The process is the router's own engine over its experts (:class:`tests.local_cluster.LocalCluster`),
and transformers agrees with it on greedy tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer

from router.messages.request import GenerationRequest, SamplingParams
from tests.blackbox.asks import TIMEOUT_S, Ask
from tests.checkpoints import transformers_tokens
from tests.local_cluster import MODEL, LocalCluster, greedy_request

AGREED_PROMPTS, AGREED_TOKENS = 4, 24


class Expected(NamedTuple):
    """One choice as it must come: log probabilities of its tokens where they were asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    text: str


class Oracle:
    """The answers of one checkpoint; remembers them. Safe for threads."""

    def __init__(self, folder: Path) -> None:
        self._process = LocalCluster(folder, num_actors=1)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._folder = folder
        self._known: dict[tuple[object, ...], list[Expected]] = {}
        self._lock = threading.Lock()

    def agree(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise unless transformers has the same greedy tokens."""
        model = AutoModelForCausalLM.from_pretrained(self._folder).eval()
        for number, prompt in enumerate(prompts[:AGREED_PROMPTS]):
            request = greedy_request(f"agree {number}", prompt, AGREED_TOKENS)
            [[event]] = self._process.generate(request)
            if event.token_ids != transformers_tokens(model, prompt, AGREED_TOKENS):
                raise RuntimeError(f"transformers has other tokens for prompt {number}")

    def expected(self, ask: Ask) -> list[Expected]:
        """Return the choices of a request."""
        key = (ask.prompt, ask.max_tokens, ask.temperature, ask.seed, ask.n, ask.ignore_eos)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._compute(ask, f"{len(self._known)}")
            return self._known[key]

    def _compute(self, ask: Ask, request_id: str) -> list[Expected]:
        sampling = SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            n=ask.n,
            ignore_eos=ask.ignore_eos,
            logprobs=0,
        )
        deadline_s = time.monotonic() + TIMEOUT_S
        request = GenerationRequest(request_id, MODEL, ask.prompt, sampling, deadline_s)
        [events] = self._process.generate(request)
        return [
            Expected(
                event.token_ids,
                tuple(row.logprob for row in event.logprobs),
                event.finish_reason,
                self._tokenizer.decode(event.token_ids, skip_special_tokens=True),
            )
            for event in events
        ]

    def close(self) -> None:
        """End the process's threads."""
        self._process.close()
