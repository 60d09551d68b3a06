"""``expertmesh config``: what a deployment file may hold, and what one comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from router.cli.common import AsJson, write, write_json

config = typer.Typer(
    no_args_is_help=True, help="What a deployment file may hold, and what one comes to."
)


@config.command()
def schema(
    args: Annotated[
        bool, typer.Option("--args", help="Only what stands under an application's args.")
    ] = False,
) -> None:
    """Print the JSON Schema of a deployment file, for editors and other checkers.

    Example: expertmesh config schema > expertmesh.schema.json

    An editor with a YAML language server takes it from a file's first line:
    `# yaml-language-server: $schema=expertmesh.schema.json`
    """
    from router.deployment_schema import args_schema, file_schema

    write_json(args_schema() if args else file_schema(), indent=2)


@config.command()
def show(
    file: Annotated[Path, typer.Argument(help="A deployment file, as `serve run` takes it.")],
    as_json: AsJson = False,
) -> None:
    """Print a deployment file with every default of its args filled in.

    Example: expertmesh config show deploy/cluster.yaml

    What is printed is a deployment file itself and means the same. Checkpoints are not looked at;
    `expertmesh check` does.
    """
    from router.config import parse_deployment, read_document

    document = read_document(file)
    parsed = parse_deployment(document, file)
    for application, (_, args) in zip(document["applications"], parsed, strict=True):
        application["args"] = args.effective()
    if as_json:
        write_json(document, indent=2)
    else:
        write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))
