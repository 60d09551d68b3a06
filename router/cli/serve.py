"""``expertmesh serve``: what ``serve run`` does, from anywhere, and with nothing to decipher."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
import yaml

from router.cli.common import BAD_USAGE, fail

PROGRAM = "serve"
MODEL_FILES = ("mixture.yaml", "config.json")
"""The files that a mixture's or a checkpoint's folder has."""


def serve(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A deployment file, or a model's folder; by default the bundled model's file.",
            show_default="",
        ),
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

    A folder of a mixture or of a checkpoint is served under its name, as cluster.yaml serves the
    bundled model.
    """
    with ExitStack() as stack:
        if file is not None and file.is_dir():
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="expertmesh-")))
            path = _file_of(file, folder)
        else:
            path = file or _bundled()
            if not path.is_file():
                fail(
                    f"{path}: does not exist; a deployment file is needed, as deploy/cluster.yaml, "
                    "or a model's folder",
                    BAD_USAGE,
                )
        _serve(path, ray_address)


def _bundled() -> Path:
    return Path(str(files("deploy"))) / "cluster.yaml"


def _file_of(model: Path, folder: Path) -> Path:
    """Write the deployment file of one model's folder into ``folder``."""
    from router.config import read_document

    if not any((model / name).is_file() for name in MODEL_FILES):
        fail(
            f"{model}: is a folder without {' or '.join(MODEL_FILES)}; a deployment file or a "
            "model's folder is needed",
            BAD_USAGE,
        )
    path = model.resolve()
    document = read_document(_bundled())
    document["applications"][0]["args"]["models"] = [{"id": path.name, "path": str(path)}]
    written = folder / f"{path.name}.yaml"
    written.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return written


def _serve(path: Path, ray_address: str | None) -> None:
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
