"""``expertmesh bench``: load on a running server, and what it makes of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from router.cli.common import (
    INTERRUPTED,
    REFUSED,
    Address,
    AsJson,
    Model,
    Timeout,
    write_json,
)
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client, ModelInfo, Sampling
from router.ops.load_test import Load, Measured, put_load

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
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Put load on a running server and measure it.

    Example: expertmesh bench --clients 16 --requests 200 --max-tokens 64

    Every request is greedy, goes on past any end of text for all its tokens, and is sent once,
    without retries. The exit code is 1 when one failed; Ctrl-C ends it with what was measured.
    """
    with Client(address) as client:
        info = client.model_info(model)[0]
    load = Load(
        prompts=prompt or _random_prompts(info, prompt_tokens),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        model=info.id,
        clients=clients,
        requests=requests,
        streamed=stream,
        timeout_s=timeout,
    )
    measured = Measured()
    try:
        _run(address, load, measured)
    except KeyboardInterrupt:
        _show(load, measured, as_json)
        raise typer.Exit(INTERRUPTED) from None
    _show(load, measured, as_json)
    if measured.failed:
        raise typer.Exit(REFUSED)


def _random_prompts(info: ModelInfo, length: int) -> list[Sequence[int]]:
    """Return prompts that are the same in every run, so that runs can be compared."""
    source = random.Random(0)
    return [
        [source.randrange(info.vocab_size) for _ in range(length)]
        for _ in range(_NUM_RANDOM_PROMPTS)
    ]


def _run(address: str, load: Load, measured: Measured) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{load.clients} at once", total=load.requests, failed="")

        def on_end() -> None:
            failed = f"[red]{measured.failed} failed" if measured.failed else ""
            progress.update(task, advance=1, failed=failed)

        asyncio.run(put_load(address, load, measured, on_end))


def _show(load: Load, measured: Measured, as_json: bool) -> None:
    told = measured.to_json()
    if as_json:
        asked = {
            "model": load.model,
            "clients": load.clients,
            "requests": load.requests,
            "max_tokens": load.sampling.max_tokens,
            "streamed": load.streamed,
        }
        write_json({**asked, **told}, indent=2)
        return
    console = Console()
    console.print(
        f"{load.model}: {told['succeeded']} of {load.requests} requests, {load.clients} at once, "
        f"in {told['elapsed_s']:.2f} s: {told['tokens_per_s']:.0f} tokens/s, "
        f"{told['requests_per_s']:.1f} requests/s",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_times(told, load.streamed))
    for kind, one in told["failures"].items():
        console.print(
            f"{one['count']} failed, {kind}: {one['first']}",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _times(told: dict[str, Any], streamed: bool) -> Table:
    table = Table("ms", "p50", "p99")
    rows = {"whole request": "request_ms"}
    if streamed:
        rows = {"first token": "first_token_ms", "between tokens": "between_tokens_ms", **rows}
    for name, key in rows.items():
        values = [told[key][percent] for percent in ("p50", "p99")]
        table.add_row(name, *("" if value is None else f"{value:.1f}" for value in values))
    return table
