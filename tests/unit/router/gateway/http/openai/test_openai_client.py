"""The real openai client against the app, over a scripted upstream."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from tests.unit.gateway_fakes import FakeUpstream, http_app, says


def test_the_openai_client() -> None:
    async def run() -> None:
        upstream = FakeUpstream(says("the word"))
        app = http_app(upstream)
        transport = httpx.ASGITransport(app)
        client = openai.AsyncOpenAI(
            api_key="none",
            base_url="http://test/v1",
            max_retries=0,
            timeout=10,
            http_client=httpx.AsyncClient(transport=transport),
        )
        assert [model.id async for model in client.models.list()] == ["tiny", "bare"]
        text = await client.completions.create(model="tiny", prompt="in", max_tokens=5, logprobs=1)
        assert text.choices[0].text == "the word"
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "in"}],
            logprobs=True,
            extra_body={
                **{"top_k": 5, "min_p": 0.1, "ignore_eos": True, "return_token_ids": True},
                "priority": -3,
            },
        )
        assert [request.priority for request in upstream.requests] == [0, -3]
        assert answer.choices[0].message.content == "the word"
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "in"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces = [chunk async for chunk in stream]
        texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "".join(texts) == "the word"
        assert pieces[-1].usage is not None
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nope", prompt="in")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="tiny", prompt="in", temperature=-1)
        assert caught.value.param == "temperature"
        await client.close()

    asyncio.run(asyncio.wait_for(run(), 30))
