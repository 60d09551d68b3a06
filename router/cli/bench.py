"""``expertmesh bench``: a load test of a running server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from router.cli.common import (
    INTERRUPTED,
    REFUSED,
    Address,
    ApiKey,
    AsJson,
    Model,
    Timeout,
    write_json,
)
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client, ModelInfo, Sampling
from router.client.wire import first_model
from router.observability.progress import bar
from router.ops.load_test import LoadTest, Results, run_load_test

MAX_CLIENTS, MAX_REQUESTS = 1024, 100_000
_NUM_RANDOM_PROMPTS = 64


def bench(
    clients: Annotated[
        int, typer.Option(min=1, max=MAX_CLIENTS, help="Requests under way at once.")
    ] = 8,
    requests: Annotated[int, typer.Option(min=1, max=MAX_REQUESTS, help="Requests in all.")] = 64,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; repeatable, they take turns.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Without --prompt: length of the random prompts.")
    ] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Ask for answers piece by piece.")
    ] = True,
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Put load on a running server and measure it.

    Example: expertmesh bench --clients 16 --requests 200 --max-tokens 64

    Every request is greedy, ignores the end of the text, and is sent once, without retries. The
    exit code is 1 when a request failed. Ctrl-C ends the test and prints its results so far.
    """
    with Client(address, api_key=api_key) as client:
        info = first_model(client.model_info(model))
    test = LoadTest(
        prompts=prompt or _random_prompts(info, prompt_tokens),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        model=info.id,
        clients=clients,
        requests=requests,
        streamed=stream,
        timeout_s=timeout,
    )
    results = Results()
    try:
        _run(address, api_key, test, results)
        code = REFUSED if results.failed else 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    _show(test, results, as_json)
    raise typer.Exit(code)


def _random_prompts(info: ModelInfo, length: int) -> list[Sequence[int]]:
    """Return prompts of random tokens; they are the same in every run, so that runs compare."""
    source = random.Random(0)
    return [
        [source.randrange(info.vocab_size) for _ in range(length)]
        for _ in range(_NUM_RANDOM_PROMPTS)
    ]


def _run(address: str, api_key: str | None, test: LoadTest, results: Results) -> None:
    with bar(f"{test.clients} at once", test.requests) as update:

        def on_end() -> None:
            failed = f"[red]{results.failed} failed" if results.failed else ""
            update(advance=1, remark=failed)

        asyncio.run(run_load_test(address, api_key, test, results, on_end))


def _show(test: LoadTest, results: Results, as_json: bool) -> None:
    figures = results.to_json()
    if as_json:
        settings = {
            "model": test.model,
            "clients": test.clients,
            "requests": test.requests,
            "max_tokens": test.sampling.max_tokens,
            "streamed": test.streamed,
        }
        write_json(settings | figures, indent=2)
        return
    console = Console()
    console.print(
        f"{test.model}: {results.succeeded} of {test.requests} requests, {test.clients} at once, "
        f"in {results.elapsed_s:.2f} s: {figures['tokens_per_s']:.0f} tokens/s, "
        f"{figures['requests_per_s']:.1f} requests/s",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_times(figures, test.streamed))
    for kind, failures in sorted(results.failures.items()):
        console.print(
            f"{failures.count} failed, {kind}: {failures.first}",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _times(figures: dict[str, Any], streamed: bool) -> Table:
    table = Table("ms", "p50", "p99")
    rows = {"whole request": "request_ms"}
    if streamed:
        rows = {"first token": "first_token_ms", "between tokens": "between_tokens_ms", **rows}
    for name, key in rows.items():
        values = [figures[key][percent] for percent in ("p50", "p99")]
        table.add_row(name, *("" if value is None else f"{value:.1f}" for value in values))
    return table
