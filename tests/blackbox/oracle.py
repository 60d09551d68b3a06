"""What one process computes of a request: the router's engine over its experts, without Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from router.messages.request import GenerationRequest, SamplingParams
from tests.blackbox.asks import SAMPLING, TIMEOUT_S, Ask, Choice
from tests.checkpoints import transformers_tokens
from tests.local_cluster import MODEL, LocalCluster, greedy_request

AGREED_PROMPTS, AGREED_TOKENS = 4, 24


class Oracle:
    """The answers of one checkpoint; remembers them."""

    def __init__(self, folder: Path, prompts: Sequence[Sequence[int]]) -> None:
        """Raises ``RuntimeError`` unless transformers has the same greedy tokens for prompts."""
        self._process = LocalCluster(folder, num_actors=1)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._known: dict[tuple[object, ...], list[Choice]] = {}
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for number, prompt in enumerate(prompts[:AGREED_PROMPTS]):
            request = greedy_request(f"agreed-{number}", prompt, AGREED_TOKENS)
            [[event]] = self._process.generate(request)
            if event.token_ids != transformers_tokens(model, prompt, AGREED_TOKENS):
                raise RuntimeError(f"transformers has other tokens for {prompt}")

    def expected(self, ask: Ask) -> list[Choice]:
        """Return the choices of a request."""
        sampling = {name: ask.body[name] for name in SAMPLING} | {"logprobs": 0}
        key = (ask.prompt, *sampling.values())
        if key not in self._known:
            params = SamplingParams(**sampling)
            deadline_s = time.monotonic() + TIMEOUT_S
            request = GenerationRequest(str(ask.number), MODEL, ask.prompt, params, deadline_s)
            [events] = self._process.generate(request)
            self._known[key] = [
                Choice(
                    event.token_ids,
                    tuple(row.logprob for row in event.logprobs),
                    self._tokenizer.decode(event.token_ids, skip_special_tokens=True),
                    finish_reason=event.finish_reason,
                )
                for event in events
            ]
        return self._known[key]
