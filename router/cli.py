"""The ``expertmesh`` command: generate text, show the cluster, check a deployment file.

Neither torch nor ray nor transformers is imported for ``generate`` and ``status``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import CheckpointError, ConfigError, ExpertMeshError
from cluster.status import ActorStatus, ClusterStatus, ProcessStatus
from router.client import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Client,
    Reply,
    Sampling,
    UnreachableError,
)

REFUSED, BAD_USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve Mixture-of-Experts models from expert actors.\n\n"
    "Exit codes: 0 ok, 1 the server refused or failed, 2 bad usage or configuration, "
    "3 no server answers at the address.",
)

Address = Annotated[str, typer.Option(help="host:port of the gRPC gateway.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
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
    with _exit_codes(address), Client(address) as client:
        if stream:
            pieces = client.stream(prompt, sampling, model=model, timeout_s=timeout)
            _print_stream(pieces, as_json)
        else:
            reply = client.generate(prompt, sampling, model=model, timeout_s=timeout)[0]
            _write(json.dumps(asdict(reply)) if as_json else reply.text)
            _write("\n")


@app.command()
def status(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show which processes serve and which experts each actor holds.

    Example: expertmesh status --json
    """
    with _exit_codes(address), Client(address) as client:
        told = client.status()
    if as_json:
        _write(json.dumps(told.to_wire(), indent=2) + "\n")
    else:
        _print_status(told)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A deployment file, as `serve run` takes it.")],
    as_json: AsJson = False,
) -> None:
    """Check a deployment file and its checkpoints without starting anything.

    Example: expertmesh check deploy/cluster.yaml
    """
    from router.check import check_file

    try:
        lines = check_file(file)
    except (ConfigError, CheckpointError) as error:
        if as_json:
            _write(json.dumps({"ok": False, "error": error.to_wire()}) + "\n")
        _fail(str(error), BAD_USAGE)
    if as_json:
        _write(json.dumps({"ok": True, "checks": lines}) + "\n")
    else:
        _write("".join(f"{line}\n" for line in lines))


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    app()


@contextmanager
def _exit_codes(address: str) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code."""
    try:
        yield
    except UnreachableError:
        _fail(f"no ExpertMesh server answers at {address}; is `serve run` running?", UNREACHABLE)
    except ExpertMeshError as error:
        _fail(str(error), REFUSED)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"expertmesh: {' '.join(message.split())}\n")
    raise typer.Exit(code)


def _print_stream(pieces: Iterator[Reply], as_json: bool) -> None:
    for piece in pieces:
        _write(json.dumps(asdict(piece)) + "\n" if as_json else piece.text)
    if not as_json:
        _write("\n")


def _print_status(told: ClusterStatus) -> None:
    ready = "ready" if told.missing_experts == 0 else f"{told.missing_experts} experts missing"
    copies = f"copies: {told.live_copies} live, {told.min_copies} wanted"
    _write(
        f"models: {', '.join(told.models)}   placement: epoch {told.epoch}, "
        f"version {told.placement_version}   {ready}   {copies}\n"
        f"controller: pid {told.controller_pid}   "
        f"routers: {_pids(told.routers)}   gateways: {_pids(told.gateways)}\n"
    )
    table = Table("actor", "pid", "node", "device", "generation", "experts", "tokens")
    for actor in told.actors:
        table.add_row(
            actor.actor_id,
            str(actor.pid),
            _short(actor.node),
            actor.device,
            str(actor.generation),
            _experts(actor),
            str(actor.tokens),
        )
    Console().print(table)


def _pids(processes: tuple[ProcessStatus, ...]) -> str:
    return ", ".join(f"{one.pid}@{_short(one.node)}" for one in processes) or "none"


def _short(node: str) -> str:
    """Return the beginning of a node's id, enough to tell nodes apart; --json has all of it."""
    return node[:10]


def _experts(actor: ActorStatus) -> str:
    """Return how many experts an actor holds of each model, and of how many layers."""
    models = sorted({model for model, _, _ in actor.experts})
    parts = []
    for model in models:
        layers = [layer for name, layer, _ in actor.experts if name == model]
        parts.append(f"{model}: {len(layers)} in {len(set(layers))} layers")
    return "; ".join(parts) or "none"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
