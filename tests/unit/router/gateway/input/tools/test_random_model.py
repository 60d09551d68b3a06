"""A model of random weights with tools: its calls are valid, and survive the loss of a router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from router.engine.constraints import Grammars
from router.engine.scheduling.scheduler import Limits
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import MODEL, LocalCluster
from tests.local_gateway import LocalGateway, model_of
from tests.unit.router.gateway.input.tools.chat_models import save_tokenizer

ASKED: Any = [{"role": "user", "content": "How is Paris?"}]


class Weather(BaseModel):
    """The weather of a place."""

    city: str = Field(max_length=8)
    days: int = Field(ge=0, le=99)


class Stop(BaseModel):
    """Ends it."""

    now: bool


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Stop)]


@pytest.fixture(scope="module", params=["mixtral", "qwen", "qwen3-coder"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tools")
    save_mixtral(path, max_position_embeddings=2048)
    save_tokenizer(path, request.param)
    return path


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[LocalCluster]:
    def vocabulary() -> Any:
        return model_of(folder, cluster).tokenizer.vocabulary(VOCAB_SIZE, (0,))

    cluster = LocalCluster(
        folder, limits=Limits(32, 64, 2048), grammars=Grammars(vocabulary, VOCAB_SIZE)
    )
    yield cluster
    cluster.close()


def ask(gateway: LocalGateway, asking: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(gateway.app)
        async with openai.AsyncOpenAI(
            api_key="none",
            base_url="http://test/v1",
            max_retries=0,
            timeout=60,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            return await asking(client)

    return asyncio.run(asyncio.wait_for(run(), 90))


@pytest.mark.parametrize("choice", ["required", "Stop"])
def test_calls_are_valid(folder: Path, cluster: LocalCluster, choice: str) -> None:
    named: Any = {"type": "function", "function": {"name": choice}}

    async def asking(client: openai.AsyncOpenAI) -> None:
        for seed in range(3):
            answer = await client.chat.completions.parse(
                model=MODEL,
                messages=ASKED,
                tools=TOOLS,
                tool_choice="required" if choice == "required" else named,
                parallel_tool_calls=False,
                seed=seed,
                max_tokens=400,
                # No thought, whose end a random model rarely finds.
                extra_body={"bad_words": ["<think>"]},
            )
            [picked] = answer.choices
            assert picked.finish_reason == "tool_calls"
            [call] = picked.message.tool_calls or []
            assert isinstance(call.function.parsed_arguments, Weather | Stop)
            assert choice in ("required", call.function.name)
            assert picked.message.content is None

    ask(LocalGateway(folder, cluster), asking)


def test_a_stream_of_calls_goes_on_with_the_same_tokens(
    folder: Path, cluster: LocalCluster
) -> None:
    async def asking(client: openai.AsyncOpenAI) -> list[Any]:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=ASKED,
            tools=TOOLS,  # type: ignore[arg-type]
            tool_choice="required",
            seed=5,
            stream=True,
            max_tokens=400,
            extra_body={"bad_words": ["<think>"], "return_token_ids": True},
        )
        parts: list[Any] = []
        async for chunk in stream:
            for choice in chunk.choices:
                parts += (choice.model_extra or {}).get("token_ids", [])
                parts += [
                    (call.index, call.function and call.function.name, call.function.arguments)
                    for call in choice.delta.tool_calls or []
                    if call.function is not None
                ]
                parts.append(choice.finish_reason)
        return [part for part in parts if part is not None]

    whole = ask(LocalGateway(folder, cluster), asking)
    calls = [part for part in whole if isinstance(part, tuple)]
    assert len(calls) > 5
    first = "".join(arguments or "" for index, _, arguments in calls if index == 0)
    assert isinstance(json.loads(first), dict)
    for lost_after in (1, 12, 30):
        assert ask(LocalGateway(folder, cluster, lost_after=lost_after), asking) == whole
