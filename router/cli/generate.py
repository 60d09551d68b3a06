"""``expertmesh generate``: continue a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from router.cli.common import Address, AsJson, write, write_json
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client, Reply, Sampling


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    model: Annotated[str, typer.Option(help="Model id; by default the first served.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from this share of likelihood.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens; 0: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt.

    Example: expertmesh generate "In the beginning" --stream --max-tokens 64

    With --json one object is printed; with --stream too, one object per line and piece.
    """
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
    )
    with Client(address) as client:
        if stream:
            pieces = client.stream(prompt, sampling, model=model, timeout_s=timeout)
            _print_stream(pieces, as_json)
            return
        reply = client.generate(prompt, sampling, model=model, timeout_s=timeout)[0]
        if as_json:
            write_json(asdict(reply))
        else:
            write(reply.text + "\n")


def _print_stream(pieces: Iterator[Reply], as_json: bool) -> None:
    for piece in pieces:
        if as_json:
            write_json(asdict(piece))
        else:
            write(piece.text)
    if not as_json:
        write("\n")
