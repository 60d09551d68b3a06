"""``expertmesh serve`` and ``deploy``: Serve's commands, for checked and completed files."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib.metadata import entry_points
from importlib.resources import files
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Annotated, Any, Literal

import typer
import yaml

from router.cli.common import BAD_USAGE, REFUSED, fail, write

PROGRAM, WAIT_PERIOD_S = "serve", 1.0
MODEL_FILES = ("mixture.yaml", "config.json")
"""The files that a mixture's or a checkpoint's folder has."""


def serve(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE|FOLDER|OWNER/NAME",
            help="A deployment file, a model's folder, or a model of the Hugging Face hub; by "
            "default the bundled model.",
            show_default="",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**16 - 3,
            help="The port for HTTP; the two after it are for gRPC and for operators.",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="How the processes write their log lines.")
    ] = "text",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", help="The Ray cluster to join, or `auto`; by default one is started."
        ),
    ] = None,
) -> None:
    """Serve a model or a deployment file until Ctrl-C.

    Example: expertmesh serve deploy/cluster.yaml

    A model of a folder or of the hub is served under its name, as cluster.yaml serves the bundled
    model. What a file leaves out of Serve's part is filled in.
    """
    from router.ops.startup.supervisor import supervised

    if log_format == "json":
        os.environ["EXPERTMESH_LOG_FORMAT"] = "json"  # all processes of a Ray inherit it
    folder = Path(mkdtemp(prefix="expertmesh-"))
    handles_signals = supervised(write_line, folder)
    file = _file_of(target, folder)
    path = file if port is None else _with_port(file, port, folder)
    _serve(path, ray_address, folder, handles_signals)


def _bundled() -> Path:
    return Path(str(files("deploy"))) / "cluster.yaml"


def _file_of(target: str | None, folder: Path) -> Path:
    """Return the deployment file of a target; that of a model is written into ``folder``."""
    from experts.checkpoint.hub import parse_hub_id

    if target is None:
        return _bundled()
    path = Path(target)
    if path.is_file():
        return path
    if path.is_dir():
        if not any((path / name).is_file() for name in MODEL_FILES):
            fail(
                f"{path}: is a folder without {' or '.join(MODEL_FILES)}; a deployment file, a "
                "model's folder or OWNER/NAME of the hub is needed",
                BAD_USAGE,
            )
        return _of_model(path.resolve().name, str(path.resolve()), folder)
    hub_id = None if path.suffix in (".yaml", ".yml") else parse_hub_id(target)
    if hub_id is None:
        fail(
            f"{path}: does not exist; a deployment file, as deploy/cluster.yaml, a model's folder "
            "or OWNER/NAME of the hub is needed",
            BAD_USAGE,
        )
    return _of_model(hub_id.repository.rpartition("/")[2], target, folder)


def _of_model(name: str, path: str, folder: Path) -> Path:
    """Write the deployment file of one model into ``folder``."""
    from router.config.deployment import read_document

    document = read_document(_bundled())
    document["applications"][0]["args"]["models"] = [{"id": name, "path": path}]
    return _written(document, folder / f"{name}.yaml")


def _with_port(file: Path, port: int, folder: Path) -> Path:
    """Write a deployment file with other ports into ``folder``."""
    from router.config.deployment import load_deployment, read_file

    if len(load_deployment(file)) > 1:
        fail("--port: is for a file of one application; give the ports in the file", BAD_USAGE)
    document = read_file(file)
    gateway = document["applications"][0]["args"].setdefault("gateway", {})
    ports = {"http_port": port, "grpc_port": port + 1, "admin_port": port + 2}
    gateway["listen"] = {**(gateway.get("listen") or {}), **ports}
    return _written(document, folder / file.name)


def deploy(
    file: Annotated[Path, typer.Argument(help="A deployment file.")],
    address: Annotated[
        str | None,
        typer.Option("--address", help="The dashboard of the Ray cluster, as `serve deploy` has."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return once it serves; a failure is exit code 1.")
    ] = False,
) -> None:
    """Send a deployment file to a running Ray cluster.

    Example: expertmesh deploy deploy/multi-node.yaml --wait

    It replaces what the cluster serves; requests under way go on. What the file leaves out of
    Serve's part is filled in.
    """
    from router.ops.startup.ray_token import send_token

    send_token(address)
    from router.config.deployment import load_deployment, read_file
    from router.ops.startup.preflight import check_deploy
    from router.serve.options import completed

    load_deployment(file)
    document = completed(read_file(file))
    check_deploy(file, document, address)
    with TemporaryDirectory(prefix="expertmesh-") as folder:
        written = _written(document, Path(folder) / file.name)
        options = [] if address is None else ["--address", address]
        _run_quietly(file, ["deploy", *options, str(written)])
    if wait:
        _wait_served(file, options)
    write(f"expertmesh: {'serving' if wait else 'sent'} {file}\n")


def _wait_served(file: Path, options: list[str]) -> None:
    """Return once all applications run; ends the command when one has failed."""
    while True:
        told = yaml.safe_load(_run_quietly(file, ["status", *options])) or {}
        applications = told.get("applications") or {}
        for name, state in applications.items():
            if state["status"] == "DEPLOY_FAILED":
                message = state["message"].strip() or "see `expertmesh logs`"
                fail(f"{file}: {name}: {message}", REFUSED)
        if applications and all(one["status"] == "RUNNING" for one in applications.values()):
            return
        time.sleep(WAIT_PERIOD_S)


def _serve(
    path: Path, ray_address: str | None, folder: Path, handles_signals: Callable[[], None]
) -> None:
    from router.ops.doctor.running_ray import is_stale, loopback_of, target_of
    from router.ops.startup.ray_token import (
        dashboard_variable,
        loopback_variable,
        token_variable,
    )
    from router.security.token_file import make_token

    target = target_of(ray_address, os.environ)
    if target is not None and is_stale(target):
        write_line(f"expertmesh: the Ray that {target.named_by} names has ended: starting another")
        target, ray_address = None, "local"
    starts_ray = target is None
    variables = {**token_variable(), **loopback_variable()} if target is None else {}
    os.environ.update(variables if target is None else loopback_of(target.address))
    if starts_ray:
        make_token(os.environ)
    import ray

    from router.config.deployment import load_deployment, read_file
    from router.ops.startup import preflight
    from router.ops.startup.termination import Termination
    from router.serve.options import completed

    load_deployment(path)  # Serve's command shows no more than a stack for what is no YAML
    document = completed(read_file(path))
    preflight.check_start(path, document, ray_address)
    preflight.tell_progress(document, starts_ray)
    context = ray.init(ray_address, namespace="serve")
    Termination(write_line).install()
    handles_signals()
    if starts_ray:
        variables |= dashboard_variable(context.dashboard_url or "")
        variables["RAY_ADDRESS"] = context.address_info["gcs_address"]
        preflight.tell_other_shells(variables)
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


def _run_quietly(path: Path, arguments: list[str]) -> str:
    """Run Serve's own command; returns what it prints, and ends the command if it fails."""
    out, errors = StringIO(), StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            _run_command(path, arguments)
    except typer.Exit:  # its line is among the errors
        sys.stderr.write(errors.getvalue())
        raise
    except Exception as error:
        fail(f"{path}: `serve {arguments[0]}` failed: {error or errors.getvalue()}", REFUSED)
    return out.getvalue()


def write_line(line: str) -> None:
    """Print a line past Python's buffers, which a signal handler must not enter again."""
    with suppress(OSError):  # nobody reads it
        os.write(sys.stdout.fileno(), f"{line}\n".encode())
