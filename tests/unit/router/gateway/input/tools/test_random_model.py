"""A model of random weights with tools: its calls are valid, and survive the loss of a router."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from router.engine.constraints import Grammars
from router.engine.scheduling.scheduler import Limits
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import MODEL, LocalCluster
from tests.local_gateway import LocalGateway, model_of
from tests.unit.router.gateway.input.tools.chat_models import ask_app, save_tokenizer


class Weather(BaseModel):
    """The weather of a place."""

    city: str = Field(max_length=8)
    days: int = Field(ge=0, le=99)


class Stop(BaseModel):
    """Ends it."""

    now: bool


TOOLS: dict[str, type[BaseModel]] = {"Weather": Weather, "Stop": Stop}


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


@pytest.mark.parametrize("choice", ["required", "Stop"])
def test_calls_are_valid_and_survive_a_router(
    folder: Path, cluster: LocalCluster, choice: str
) -> None:
    named = {"type": "function", "function": {"name": choice}}
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "How is Paris?"}],
        "tools": [openai.pydantic_function_tool(tool) for tool in TOOLS.values()],
        "tool_choice": choice if choice == "required" else named,
        "max_tokens": 400,
        "stream": True,
        # No thought, whose end a random model rarely finds.
        "extra_body": {"bad_words": ["<think>"], "return_token_ids": True},
    }

    def told(seed: int, lost_after: int | None = None, **options: Any) -> list[Any]:
        """Return the parts of a stream: token ids, pieces of calls, and the reason of the end."""

        async def asking(client: openai.AsyncOpenAI) -> list[Any]:
            parts: list[Any] = []
            given = {**asked, **options, "seed": seed}
            async for chunk in await client.chat.completions.create(**given):
                for picked in chunk.choices:
                    parts += picked.model_extra.get("token_ids", [])
                    for call in picked.delta.tool_calls or []:
                        parts.append((call.index, call.function.name, call.function.arguments))
                    parts += [picked.delta.content, picked.finish_reason]
            return [part for part in parts if part]

        found: list[Any] = ask_app(LocalGateway(folder, cluster, None, lost_after).app, asking)
        return found

    for seed in range(3):
        *parts, reason = told(seed, parallel_tool_calls=False)
        assert reason == "tool_calls"
        assert not [part for part in parts if isinstance(part, str)]
        pieces = [part for part in parts if isinstance(part, tuple)]
        [name] = [name for _, name, _ in pieces if name]
        assert choice in ("required", name)
        TOOLS[name].model_validate_json("".join(arguments or "" for _, _, arguments in pieces))
    whole = told(5)
    assert len([part for part in whole if isinstance(part, tuple)]) > 5
    for lost_after in (1, 12, 30):
        assert told(5, lost_after) == whole
