"""One call of an OpenAI endpoint: its checked requests, and their answers as JSON or events."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway.input.request.model import OpenAiRequest
from router.gateway.input.request.parts import StreamOptions
from router.gateway.input.routed import rows_object
from router.gateway.input.tokenizer import Tokenizer
from router.gateway.input.validate import CheckedRequest
from router.gateway.service import Collected, Delta, GenerationService
from router.messages.request import GenerationRequest, Usage
from router.security.keys import Caller


def stream_options(asked: OpenAiRequest) -> StreamOptions:
    """Return what a stream has beside the text; raises :class:`InvalidRequestError`."""
    options = asked.stream_options or StreamOptions()
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequestError("is allowed only with stream true", "stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequestError(
            "is allowed only with include_usage true, as in vLLM",
            "stream_options.continuous_usage_stats",
        )
    return options


@dataclass(eq=False)
class OpenAiCall(ABC):
    """A checked call; subclasses have the form of their endpoint's answers.

    ``checked`` has one request per prompt; choice ``j`` of prompt ``i`` has index ``i * n + j``.
    """

    request_id: str
    checked: list[CheckedRequest]
    is_stream: bool
    options: StreamOptions
    return_token_ids: bool
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.checked[0].model.tokenizer

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log probabilities."""
        return self.checked[0].request.sampling.logprobs is not None

    @abstractmethod
    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """Return an answer, or a chunk of a stream, with these choices and without usage."""

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks before the first text."""
        return []

    @abstractmethod
    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """Return the choice object of a chunk."""

    @abstractmethod
    def choice(self, index: int, whole: Collected) -> dict[str, Any]:
        """Return the choice object of a full answer."""

    @abstractmethod
    def logprobs(self, index: int, part: Delta | Collected) -> dict[str, Any]:
        """Return the log probabilities of the tokens of a choice, or of a piece of it."""

    def answer_object(
        self, id_prefix: str, kind: str, choices: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return an answer or a chunk without usage; ``kind`` is OpenAI's name of it."""
        return {
            "id": f"{id_prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.checked[0].request.model,
            "choices": choices,
        }

    def choice_object(
        self, index: int, text: dict[str, Any], part: Delta | Collected
    ) -> dict[str, Any]:
        """Return a choice, or a piece of it, with its ``text`` as the endpoint writes it."""
        choice: dict[str, Any] = {
            "index": index,
            **text,
            "logprobs": self.logprobs(index, part) if self.wants_logprobs else None,
            "finish_reason": part.finish_reason,
        }
        if self.return_token_ids:
            choice["token_ids"] = list(part.token_ids)
        if part.routed and (routed := self.request_of(index).routed) is not None:
            choice["routed_experts"] = rows_object(routed, part.routed)
        return choice

    def request_of(self, index: int) -> GenerationRequest:
        """Return the request of choice ``index``."""
        return self.checked[index // self.checked[0].request.sampling.n].request

    def prompt_token_ids(self, index: int) -> list[int]:
        """Return the prompt of choice ``index``."""
        return list(self.request_of(index).prompt_token_ids)

    async def deltas(
        self, service: GenerationService, caller: Caller
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Run all requests; yields each delta with the index of its choice in the call.

        The ``caller`` is charged for one call.
        """
        n = self.checked[0].request.sampling.n
        with service.charge(self.checked, caller, "http") as charge:
            streams = [service.generate(checked, "http", charge) for checked in self.checked]
            async with aclosing(_merge(streams, n)) as deltas:
                async for delta in deltas:
                    yield delta

    async def answer(
        self, service: GenerationService, caller: Caller
    ) -> tuple[dict[str, Any], bool]:
        """Run all requests to their end; returns the answer, and whether all of it is exact."""
        wholes: dict[int, Collected] = {}
        usages: list[Usage] = []
        async with aclosing(self.deltas(service, caller)) as deltas:
            async for index, delta in deltas:
                wholes.setdefault(index, Collected()).add(delta)
                if delta.usage is not None:
                    usages.append(delta.usage)
        choices = [
            {**self.choice(index, wholes[index]), "exact": wholes[index].exact}
            for index in sorted(wholes)
        ]
        body = self.envelope(choices, streamed=False)
        body["usage"] = usage_object(usages)
        return body, all(whole.exact for whole in wholes.values())

    async def chunks(
        self, first: tuple[int, Delta], rest: AsyncGenerator[tuple[int, Delta], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a stream; ``first`` has been taken from ``rest`` already.

        The last chunk of a choice says whether all of it is exact. Earlier chunks say so only from
        the first token on that is not exact.
        """
        usages: list[Usage] = []
        inexact: set[int] = set()
        num_tokens = 0
        async with aclosing(rest):
            for chunk in self.opening():
                yield self._finish(chunk, num_tokens)
            index, delta = first
            while True:
                if delta.usage is not None:
                    usages.append(delta.usage)
                num_tokens += len(delta.token_ids)
                if self._is_worth_sending(delta):
                    piece = self.piece(index, delta)
                    if not delta.exact:
                        inexact.add(index)
                    if delta.finish_reason or index in inexact:
                        piece["exact"] = index not in inexact
                    yield self._finish(self.envelope([piece], streamed=True), num_tokens)
                following = await anext(rest, None)
                if following is None:
                    break
                index, delta = following
        if self.options.include_usage:
            yield {**self.envelope([], streamed=True), "usage": usage_object(usages)}

    def _is_worth_sending(self, delta: Delta) -> bool:
        has_more = self.return_token_ids or self.wants_logprobs or delta.routed
        parsed = delta.parsed
        has_text = delta.text or (parsed is not None and (parsed.reasoning or parsed.calls))
        return bool(has_text or delta.finish_reason or has_more or not delta.exact)

    def _finish(self, chunk: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        """Return a chunk with the usage of so many new tokens, where the client wants it."""
        if self.options.continuous_usage_stats:
            prompts = (len(checked.request.prompt_token_ids) for checked in self.checked)
            usage = usage_object([Usage(sum(prompts), num_tokens)])
            del usage["prompt_tokens_details"]  # known at the end
            return {**chunk, "usage": usage}
        return {**chunk, "usage": None} if self.options.include_usage else chunk


def usage_object(usages: list[Usage]) -> dict[str, Any]:
    """Return OpenAI's usage object, summed over the prompts of a call."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


async def _merge(
    streams: list[AsyncGenerator[Delta, None]], n: int
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Run streams side by side; the first error, or closing, ends them all."""
    if len(streams) == 1:  # needs neither a task nor a queue
        async with aclosing(streams[0]) as deltas:
            async for delta in deltas:
                yield delta.index, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(maxsize=1)

    async def pump(place: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    await queue.put((place, delta))
            await queue.put((place, None))
        except Exception as error:
            await queue.put((place, error))

    tasks = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    going = len(tasks)
    try:
        while going:
            place, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                going -= 1
            else:
                yield place * n + item.index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
