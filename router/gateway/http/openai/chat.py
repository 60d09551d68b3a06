"""OpenAI's ``/v1/chat/completions``: checks its bodies and writes its answers."""

from __future__ import annotations

from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway.http.openai.call import OpenAiCall, stream_options
from router.gateway.input.chat_request import call_id
from router.gateway.input.request.base import renamed
from router.gateway.input.request.model import ChatRequest
from router.gateway.input.tools.reader import CallPart
from router.gateway.input.validate import Validator
from router.gateway.service import Collected, Delta


def parse_chat(body: dict[str, Any], validator: Validator, request_id: str) -> ChatCall:
    """Check a body; the model's chat template renders its messages."""
    asked = validator.read(ChatRequest, body)
    options = stream_options(asked)
    names = {"logprobs": "top_logprobs"}
    if asked.max_completion_tokens is not None:
        if asked.max_tokens is not None:
            raise InvalidRequestError(
                "is another name for max_tokens; send only one of them", "max_completion_tokens"
            )
        asked.max_tokens = asked.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidRequestError("is allowed only with logprobs true", "top_logprobs")
    with renamed(lambda name: names.get(name, name)):
        checked = validator.check(asked, asked.messages, "messages", asked.stream)
    return ChatCall(request_id, [checked], asked.stream, options, asked.return_token_ids)


class ChatCall(OpenAiCall):
    """One call of ``/v1/chat/completions``."""

    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """Return a ``chat.completion`` or a ``chat.completion.chunk``."""
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        body = self.answer_object("chatcmpl", kind, choices)
        if self.return_token_ids and not streamed:
            body["prompt_token_ids"] = self.prompt_token_ids(0)
        return body

    def opening(self) -> list[dict[str, Any]]:
        """Return one chunk per choice with the role of its message."""
        chunks = []
        for index in range(self.checked[0].request.sampling.n):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunks.append(self.envelope([choice], streamed=True))
        if self.return_token_ids:
            chunks[0]["prompt_token_ids"] = self.prompt_token_ids(0)
        return chunks

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """Return one chunk's choice."""
        text: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.parsed is not None and delta.parsed.reasoning:
            text["reasoning_content"] = delta.parsed.reasoning
        if delta.parsed is not None and delta.parsed.calls:
            text["tool_calls"] = [self._call_part(index, part) for part in delta.parsed.calls]
        return self.choice_object(index, {"delta": text}, delta)

    def choice(self, index: int, whole: Collected) -> dict[str, Any]:
        """Return one whole choice."""
        message: dict[str, Any] = {"role": "assistant", "content": whole.text}
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        if whole.calls:
            message["tool_calls"] = [self._call(index, part) for part in whole.calls]
        if not whole.text and (whole.calls or whole.reasoning):
            message["content"] = None
        return self.choice_object(index, {"message": message}, whole)

    def _call(self, index: int, part: CallPart) -> dict[str, Any]:
        """Return a call, or the first part of one."""
        is_short = self.tokenizer.chat_format.has_short_ids
        return {
            # The id of the call is the client's own, who may give many the same.
            "id": call_id(self.request_of(index).request_id, index, part.index, is_short),
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }

    def _call_part(self, index: int, part: CallPart) -> dict[str, Any]:
        if part.name:
            return {"index": part.index, **self._call(index, part)}
        return {"index": part.index, "function": {"arguments": part.arguments}}

    def logprobs(self, index: int, part: Delta | Collected) -> dict[str, Any]:
        """Return each token with its alternatives."""
        content = []
        for token_id, row in zip(part.token_ids, part.logprobs, strict=True):
            top = zip(row.top_ids, row.top_logprobs, strict=True)
            entry = self._token(token_id, row.logprob)
            entry["top_logprobs"] = [self._token(top_id, logprob) for top_id, logprob in top]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.tokenizer.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }
