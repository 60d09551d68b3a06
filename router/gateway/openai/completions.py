"""OpenAI's ``/v1/completions``: from the body to checked requests, from deltas to answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway import checks
from router.gateway.openai.call import OpenAiCall
from router.gateway.openai.fields import (
    COMPLETION,
    OPTION_FIELDS,
    SAMPLING_FIELDS,
    known_fields,
    stream_options,
)
from router.gateway.service import Collected, Delta
from router.gateway.validate import CheckedRequest, RawRequest, Validator

MAX_PROMPTS = 128


def parse_completion(body: dict[str, Any], validator: Validator, request_id: str) -> CompletionCall:
    """Check a body whole, so that nothing starts when any of its prompts is wrong."""
    given = known_fields(body, COMPLETION)
    stream, include_usage = stream_options(given)
    return_token_ids = checks.boolean(given.get("return_token_ids", False), "return_token_ids")
    sampling_fields = (*SAMPLING_FIELDS, "logprobs")
    checked: list[CheckedRequest] = []
    for prompt, where in _prompts(given.get("prompt")):
        raw = RawRequest(
            model=given.get("model", ""),
            prompt=prompt,
            sampling={name: given[name] for name in sampling_fields if name in given},
            options={name: given[name] for name in OPTION_FIELDS if name in given},
            prompt_field=where,
            streamed=stream,
        )
        checked.append(validator.check(raw))
    validator.check_together(checked)
    return CompletionCall(request_id, checked, stream, include_usage, return_token_ids)


def _prompts(prompt: Any) -> list[tuple[Any, str]]:
    """Return the prompts, each with its place in the body."""
    if prompt is None:
        raise InvalidRequestError("is missing", "prompt")
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return [(prompt, "prompt")]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError(f"has {len(prompt)} prompts; at most {MAX_PROMPTS}", "prompt")
    return [(each, f"prompt[{place}]") for place, each in enumerate(prompt)]


@dataclass(eq=False)
class CompletionCall(OpenAiCall):
    """One call of ``/v1/completions``."""

    _offsets: dict[int, int] = field(default_factory=dict)
    """The length of each choice's text so far, for the text_offset of logprobs."""

    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """Return a ``text_completion``; chunks have the same shape."""
        return self.answer_object("cmpl", "text_completion", choices)

    def opening(self) -> list[dict[str, Any]]:
        """Return no chunks: completions have none before the first text."""
        return []

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """Return one chunk's choice; a choice's first chunk may have the prompt's ids."""
        return self._choice(index, delta, index not in self._offsets)

    def choice(self, index: int, whole: Collected) -> dict[str, Any]:
        """Return one whole choice."""
        return self._choice(index, whole, True)

    def _choice(self, index: int, part: Delta | Collected, is_first: bool) -> dict[str, Any]:
        choice = self.choice_object(index, {"text": part.text}, part)
        if self.return_token_ids and is_first:
            choice["prompt_token_ids"] = self.prompt_token_ids(index)
        self._offsets.setdefault(index, 0)
        return choice

    def logprobs(self, index: int, part: Delta | Collected) -> dict[str, Any]:
        """Return the tokens and their alternatives, side by side, with their places in the text."""
        offset = self._offsets.get(index, 0)
        tokens = [self.tokenizer.token_text(token_id) for token_id in part.token_ids]
        *offsets, self._offsets[index] = accumulate(map(len, tokens), initial=offset)
        return {
            "tokens": tokens,
            "token_logprobs": [row.logprob for row in part.logprobs],
            "top_logprobs": [
                {
                    self.tokenizer.token_text(top_id): logprob
                    for top_id, logprob in zip(row.top_ids, row.top_logprobs, strict=True)
                }
                for row in part.logprobs
            ],
            "text_offset": offsets,
        }
