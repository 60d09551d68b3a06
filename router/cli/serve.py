"""``expertmesh serve``: what ``serve run`` does, from anywhere, and with nothing to decipher."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from router.cli.common import BAD_USAGE, fail

PROGRAM = "serve"


def serve(
    file: Annotated[
        Path | None,
        typer.Argument(help="A deployment file; by default the bundled model's.", show_default=""),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", help="The Ray cluster to join, or `auto`; by default one is started."
        ),
    ] = None,
) -> None:
    """Serve a deployment file until Ctrl-C, with all that the file leaves out of Serve's part.

    Example: expertmesh serve deploy/cluster.yaml
    """
    path = file or Path(str(files("deploy"))) / "cluster.yaml"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        fail(f"{path}: {what}; a deployment file is needed, as deploy/cluster.yaml", BAD_USAGE)
    from router.config import load_deployment
    from router.ops.startup.preflight import attend

    load_deployment(path)  # Serve's command shows no more than a stack for what is no YAML
    address = [] if ray_address is None else ["--address", ray_address]
    command_line = [PROGRAM, "run", *address, str(path)]
    attend(command_line, path)
    _run_serve(path, command_line)


def _run_serve(path: Path, command_line: list[str]) -> None:
    import click
    from pydantic import ValidationError

    [command] = entry_points(group="console_scripts", name=PROGRAM)
    try:
        command.load().main(command_line[1:], prog_name=PROGRAM, standalone_mode=False)
    except click.Abort:  # Ctrl-C before Serve minds it itself
        raise KeyboardInterrupt from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        fail(f"{path}: {where}: {first['msg']} (given: {first['input']!r})", BAD_USAGE)
