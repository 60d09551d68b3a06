"""``expertmesh config`` and ``check``: a deployment file's keys, its defaults, and its check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from cluster.errors import CheckpointError, ConfigError
from router.cli.common import BAD_USAGE, AsJson, fail, write, write_json

config = typer.Typer(no_args_is_help=True, help="The keys and the defaults of a deployment file.")


@config.command()
def schema(
    args: Annotated[
        bool, typer.Option("--args", help="Only the schema of an application's args.")
    ] = False,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="The schema of a mixture's mixture.yaml instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of a deployment file, for editors and other checkers.

    Example: expertmesh config schema > expertmesh.schema.json

    An editor with a YAML language server takes it from a file's first line:
    `# yaml-language-server: $schema=expertmesh.schema.json`
    """
    if args and mixture:
        fail("--args and --mixture: give one of them", BAD_USAGE)
    if mixture:
        write_json(mixture_schema(), indent=2)
    else:
        write_json(args_schema() if args else file_schema(), indent=2)


@config.command()
def new() -> None:
    """Print a whole deployment file of the bundled model, with all settings of Serve.

    Example: expertmesh config new > my.yaml

    `expertmesh serve` and `deploy` need only a file's `applications`, and fill in the rest. A whole
    file is for other ways of starting Serve, such as KubeRay.
    """
    from router.serve.options import starter_text

    write(starter_text())


@config.command()
def show(
    file: Annotated[Path, typer.Argument(help="A deployment file, as `serve run` takes it.")],
    as_json: AsJson = False,
) -> None:
    """Print a deployment file with every default of its args and of Serve's settings.

    Example: expertmesh config show deploy/cluster.yaml

    The output is itself a deployment file: `expertmesh serve FILE` serves it on a Ray of its own.
    The command opens no checkpoint; `expertmesh check` does.
    """
    from router.config.deployment import parse_deployment, read_document
    from router.serve.options import completed

    document = read_document(file)
    parsed = parse_deployment(document, file)
    for application, (_, args) in zip(document["applications"], parsed, strict=True):
        application["args"] = args.effective()
    document = completed(document)
    if as_json:
        write_json(document, indent=2)
    else:
        write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))


def check(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|OWNER/NAME", help="A deployment file, or a model of the Hugging Face hub."
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Hash every byte of the checkpoints anew, and compare with the kept hashes.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a deployment file and its checkpoints without starting anything.

    Example: expertmesh check deploy/cluster.yaml

    Of a model of the hub it reads configuration and index, and fetches no weights.
    """
    from experts.checkpoint.hub import parse_hub_id
    from router.ops.plan.source import describe_hub
    from router.served import check_file

    result: dict[str, Any] = {"ok": True}
    try:
        is_file = file.exists() or file.suffix in (".yaml", ".yml")
        hub_id = None if is_file else parse_hub_id(str(file))
        if hub_id is not None:
            lines = describe_hub(hub_id)
        elif verify:
            from router.ops.hashing import verify_file

            lines, verified = verify_file(file, Console(stderr=True))
            result["hashes"] = [asdict(checkpoint) for checkpoint in verified]
        else:
            lines = check_file(file)
        if hub_id is None:
            _check_document(file)
    except (ConfigError, CheckpointError) as error:
        if as_json:
            write_json({"ok": False, "error": error.to_wire()})
        fail(str(error), BAD_USAGE)
    if as_json:
        write_json({**result, "checks": lines})
    else:
        write("".join(f"{line}\n" for line in lines))


def _check_document(file: Path) -> None:
    from router.config.deployment import read_file
    from router.ops.startup.reach import check_document
    from router.serve.options import completed

    try:
        check_document(completed(read_file(file)), file, reads_files=False)
    except ConfigError as error:
        raise ConfigError(error.message, f"{file}: {error.field}") from None


_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def args_schema() -> dict[str, Any]:
    """Return the schema of an application's ``args:``."""
    from router.config.deployment import AppConfig

    return {"$schema": _DIALECT, **AppConfig.model_json_schema()}


def mixture_schema() -> dict[str, Any]:
    """Return the schema of a ``mixture.yaml``."""
    from experts.mixture.spec import MixtureSpec

    return {"$schema": _DIALECT, **MixtureSpec.model_json_schema()}


def file_schema() -> dict[str, Any]:
    """Return the schema of a whole file: Serve's schema, with :class:`AppConfig` at ``args:``."""
    from ray.serve.schema import ServeDeploySchema

    from router.config.deployment import IMPORT_PATH, AppConfig

    schema: dict[str, Any] = {"$schema": _DIALECT, **ServeDeploySchema.model_json_schema()}
    schema["title"] = "ExpertMesh deployment file"
    definitions = schema["$defs"]
    args = AppConfig.model_json_schema()
    ours = {**args.pop("$defs"), "AppConfig": args}
    if twice := ours.keys() & definitions.keys():
        raise RuntimeError(f"Serve has classes of the same names: {', '.join(sorted(twice))}")
    definitions.update(ours)
    application = definitions["ServeApplicationSchema"]
    application["properties"]["args"] = {"$ref": "#/$defs/AppConfig"}
    application["properties"]["import_path"] = {"const": IMPORT_PATH}
    application["required"] = sorted({*application.get("required", []), "args", "import_path"})
    properties = schema["properties"]
    properties["applications"]["minItems"] = 1
    properties["proxy_location"] = {"const": "Disabled"}
    for refused in ("http_options", "grpc_options"):  # of Serve's proxies
        del properties[refused]
    return schema
