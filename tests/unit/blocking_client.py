"""The asynchronous client with the synchronous one's face, so that one test asks both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any

from router.client import DEFAULT_RETRY, AsyncClient, MixtureInfo, ModelInfo, Prediction, Reply

_TIMEOUT_S = 90


class BlockingAsyncClient:
    """An :class:`AsyncClient` in an event loop's thread of its own."""

    def __init__(self, address: str, *, retry: Any = DEFAULT_RETRY) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def make() -> AsyncClient:
            return AsyncClient(address, retry=retry)

        self._client = self._run(make())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT_S)

    def __enter__(self) -> BlockingAsyncClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
    ) -> None:
        self.close()

    def close(self) -> None:
        self._run(self._client.close())

    def generate(self, *args: Any, **options: Any) -> list[Reply]:
        replies: list[Reply] = self._run(self._client.generate(*args, **options))
        return replies

    def stream(self, *args: Any, **options: Any) -> Iterator[Reply]:
        replies = self._client.stream(*args, **options)

        async def next_reply() -> Reply | None:
            return await anext(replies, None)

        while (reply := self._run(next_reply())) is not None:
            yield reply

    def predict(self, *args: Any, **options: Any) -> Prediction:
        prediction: Prediction = self._run(self._client.predict(*args, **options))
        return prediction

    def mixture_info(self, model: str) -> MixtureInfo:
        info: MixtureInfo = self._run(self._client.mixture_info(model))
        return info

    def model_info(self) -> list[ModelInfo]:
        models: list[ModelInfo] = self._run(self._client.model_info())
        return models
