"""``expertmesh generate``: continues a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from router.cli.common import (
    Address,
    ApiKey,
    AsJson,
    MaxTokens,
    Model,
    Seed,
    Stop,
    Temperature,
    Timeout,
    TopK,
    TopP,
    write,
    write_generated,
    write_json,
)
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client, Reply, Sampling


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    model: Model = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt.

    Example: expertmesh generate "In the beginning" --stream --max-tokens 64

    With --json the command prints an object; with --stream too, it prints a line for each piece.
    """
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
    )
    with Client(address, api_key=api_key) as client:
        if stream:
            pieces = client.stream(prompt, sampling, model=model, timeout_s=timeout)
            _print_stream(pieces, as_json)
            return
        reply = client.generate(prompt, sampling, model=model, timeout_s=timeout)[0]
        if as_json:
            write_json(asdict(reply))
        else:
            write_generated(reply.text + "\n")


def _print_stream(pieces: Iterator[Reply], as_json: bool) -> None:
    for piece in pieces:
        if as_json:
            write_json(asdict(piece))
        else:
            write_generated(piece.text)
    if not as_json:
        write("\n")
