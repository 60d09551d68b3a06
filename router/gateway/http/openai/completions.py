"""OpenAI's ``/v1/completions``: from the body to checked requests, from deltas to answers."""

from __future__ import annotations

from codecs import IncrementalDecoder, getincrementaldecoder
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway.http.openai.call import OpenAiCall, stream_options
from router.gateway.input.request.model import MAX_PROMPTS, CompletionRequest
from router.gateway.input.validate import Validator
from router.gateway.service import Collected, Delta, prompt_rows
from router.messages.request import PromptLogprobs, TokenLogprobs


def parse_completion(body: dict[str, Any], validator: Validator, request_id: str) -> CompletionCall:
    """Check a body whole, so that nothing starts when any of its prompts is wrong."""
    asked = validator.read(CompletionRequest, body)
    options = stream_options(asked)
    if asked.stream and asked.prompt_logprobs is not None:
        raise InvalidRequestError("is not allowed with stream true, as in vLLM", "prompt_logprobs")
    prompts = _prompts(asked.prompt)
    if len(prompts) > 1 and asked.routed_experts is not None:
        raise InvalidRequestError("is allowed only with one prompt", "routed_experts")
    checked = [validator.check(asked, prompt, where, asked.stream) for prompt, where in prompts]
    validator.check_together(checked)
    return CompletionCall(
        request_id,
        checked,
        asked.stream,
        options,
        asked.return_token_ids,
        has_echo=asked.echo,
        prompt_logprobs=asked.prompt_logprobs,
    )


def _prompts(prompt: Any) -> list[tuple[Any, str]]:
    """Return the prompts, each with its place in the body."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return [(prompt, "prompt")]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError(f"has {len(prompt)} prompts; at most {MAX_PROMPTS}", "prompt")
    return [(each, f"prompt[{place}]") for place, each in enumerate(prompt)]


class _TextLength:
    """The number of characters in a text that comes token by token.

    A character of several tokens counts with the last of them.
    """

    def __init__(self) -> None:
        self._num_chars = 0
        self._decoder: IncrementalDecoder = getincrementaldecoder("utf-8")("replace")

    def add(self, token: bytes) -> int:
        """Take a token's bytes; returns the number of characters before it."""
        before = self._num_chars
        self._num_chars += len(self._decoder.decode(token))
        return before


@dataclass(eq=False)
class CompletionCall(OpenAiCall):
    """One call of ``/v1/completions``.

    ``prompt_logprobs`` is the field of the body, which vLLM has beside ``logprobs`` with ``echo``.
    """

    has_echo: bool = False
    prompt_logprobs: int | None = None
    _texts: dict[int, _TextLength] = field(default_factory=dict)
    """What each choice has so far, for the text_offset of logprobs."""

    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """Return a ``text_completion``; chunks have the same shape."""
        return self.answer_object("cmpl", "text_completion", choices)

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """Return one chunk's choice; a choice's first chunk may have the prompt's ids."""
        return self._choice(index, delta, index not in self._texts)

    def choice(self, index: int, whole: Collected) -> dict[str, Any]:
        """Return one whole choice."""
        return self._choice(index, whole, True)

    def _choice(self, index: int, part: Delta | Collected, is_first: bool) -> dict[str, Any]:
        choice = self.choice_object(index, {"text": part.text}, part)
        if self.return_token_ids and is_first:
            choice["prompt_token_ids"] = self.prompt_token_ids(index)
        if self.prompt_logprobs is not None:
            rows = prompt_rows(self.request_of(index), part)
            choice["prompt_logprobs"] = [self._of_prompt(*row) for row in rows]
        self._texts.setdefault(index, _TextLength())
        return choice

    def logprobs(self, index: int, part: Delta | Collected) -> dict[str, Any]:
        """Return the tokens and their alternatives, side by side, with their places in the text.

        With ``echo`` the prompt's tokens come first.
        """
        rows: list[tuple[int, TokenLogprobs | None]] = []
        if self.has_echo:
            rows += prompt_rows(self.request_of(index), part)
        rows += zip(part.token_ids, part.logprobs, strict=True)
        text = self._texts.setdefault(index, _TextLength())
        return {
            "tokens": [self.tokenizer.token_text(token_id) for token_id, _ in rows],
            "token_logprobs": [None if row is None else row.logprob for _, row in rows],
            "top_logprobs": [self._top(*row) for row in rows],
            "text_offset": [text.add(self._bytes_of(token_id)) for token_id, _ in rows],
        }

    def _bytes_of(self, token_id: int) -> bytes:
        """Return what a token adds to the text; special tokens add nothing."""
        is_special = token_id in self.tokenizer.skipped_ids
        return b"" if is_special else self.tokenizer.token_bytes(token_id)

    def _top(self, token_id: int, row: TokenLogprobs | None) -> dict[str, float] | None:
        """Return the likeliest tokens, and the token itself, by their text.

        Of several tokens with one text, such as parts of characters, the likeliest stands.
        """
        if row is None:
            return None
        num = self.checked[0].request.sampling.logprobs
        top: dict[str, float] = {}
        for top_id, logprob in zip(row.top_ids[:num], row.top_logprobs[:num], strict=True):
            top.setdefault(self.tokenizer.token_text(top_id), logprob)
        top.setdefault(self.tokenizer.token_text(token_id), row.logprob)
        return top

    def _of_prompt(self, token_id: int, row: PromptLogprobs | None) -> dict[str, Any] | None:
        """Return the log probabilities at a prompt token by token ids, in vLLM's shape."""
        if row is None:
            return None
        num = self.prompt_logprobs
        likeliest = enumerate(zip(row.top_ids[:num], row.top_logprobs[:num], strict=True), start=1)
        found = {token_id: (row.logprob, row.rank)}
        found |= {top_id: (logprob, rank) for rank, (top_id, logprob) in likeliest}
        return {
            str(each): {
                "logprob": logprob,
                "rank": rank,
                "decoded_token": self.tokenizer.token_text(each),
            }
            for each, (logprob, rank) in found.items()
        }
