"""``expertmesh serve`` and ``deploy``: Serve's commands, for checked and completed files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Annotated, Any

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
    from router.ops.startup.supervisor import supervised

    folder = Path(mkdtemp(prefix="expertmesh-"))
    handles_signals = supervised(write_line, folder)
    if file is not None and file.is_dir():
        path = _file_of(file, folder)
    else:
        path = file or _bundled()
        if not path.is_file():
            fail(
                f"{path}: does not exist; a deployment file is needed, as deploy/cluster.yaml, or "
                "a model's folder",
                BAD_USAGE,
            )
    _serve(path, ray_address, folder, handles_signals)


def _bundled() -> Path:
    return Path(str(files("deploy"))) / "cluster.yaml"


def _file_of(model: Path, folder: Path) -> Path:
    """Write the deployment file of one model's folder into ``folder``."""
    from router.config.deployment import read_document

    if not any((model / name).is_file() for name in MODEL_FILES):
        fail(
            f"{model}: is a folder without {' or '.join(MODEL_FILES)}; a deployment file or a "
            "model's folder is needed",
            BAD_USAGE,
        )
    path = model.resolve()
    document = read_document(_bundled())
    document["applications"][0]["args"]["models"] = [{"id": path.name, "path": str(path)}]
    return _written(document, folder / f"{path.name}.yaml")


def deploy(
    file: Annotated[Path, typer.Argument(help="A deployment file.")],
    address: Annotated[
        str | None,
        typer.Option("--address", help="The dashboard of the Ray cluster, as `serve deploy` has."),
    ] = None,
) -> None:
    """Send a deployment file to a running Ray cluster, with all that it leaves out of Serve's part.

    Example: expertmesh deploy deploy/multi-node.yaml

    It replaces what the cluster serves; requests under way go on.
    """
    from router.ops.startup.ray_token import send_token

    send_token(address)
    from router.config.deployment import load_deployment, read_document
    from router.ops.startup.preflight import check_deploy
    from router.serve.options import completed

    load_deployment(file)
    document = completed(read_document(file))
    check_deploy(file, document, address)
    with TemporaryDirectory(prefix="expertmesh-") as folder:
        written = _written(document, Path(folder) / file.name)
        options = [] if address is None else ["--address", address]
        _run_command(file, ["deploy", *options, str(written)])


def _serve(
    path: Path, ray_address: str | None, folder: Path, handles_signals: Callable[[], None]
) -> None:
    from router.ops.doctor.running_ray import is_stale, target_of
    from router.ops.startup.ray_token import dashboard_variable, token_variable

    target = target_of(ray_address, os.environ)
    if target is not None and is_stale(target):
        write_line(f"expertmesh: the Ray that {target.named_by} names has ended: starting another")
        target, ray_address = None, "local"
    starts_ray = target is None
    variables = token_variable() if starts_ray else {}
    os.environ.update(variables)
    import ray

    from router.config.deployment import load_deployment, read_document
    from router.ops.startup import preflight
    from router.ops.startup.termination import Termination
    from router.serve.options import completed

    load_deployment(path)  # Serve's command shows no more than a stack for what is no YAML
    document = completed(read_document(path))
    preflight.check_start(path, document, ray_address)
    preflight.tell_progress(document, starts_ray)
    context = ray.init(ray_address, namespace="serve")
    Termination(write_line).install()
    handles_signals()
    if starts_ray:
        preflight.tell_other_shells(variables | dashboard_variable(context.dashboard_url or ""))
    written = _written(document, folder / path.name)
    _run_command(path, ["run", "--address", "auto", str(written)])


def _written(document: Mapping[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def _run_command(path: Path, arguments: list[str]) -> None:
    """Run Serve's own command in this process."""
    import click
    from pydantic import ValidationError

    [command] = entry_points(group="console_scripts", name=PROGRAM)
    try:
        command.load().main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except click.Abort:  # Ctrl-C before Serve minds it itself
        raise KeyboardInterrupt from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        fail(f"{path}: {where}: {first['msg']} (given: {first['input']!r})", BAD_USAGE)


def write_line(line: str) -> None:
    """Print a line past Python's buffers, which a signal handler must not enter again."""
    with suppress(OSError):  # nobody reads it
        os.write(sys.stdout.fileno(), f"{line}\n".encode())
