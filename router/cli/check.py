"""``expertmesh check``: a deployment file and its checkpoints, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import CheckpointError, ConfigError
from router.cli.common import BAD_USAGE, AsJson, fail, write, write_json


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
            write_json({"ok": False, "error": error.to_wire()})
        fail(str(error), BAD_USAGE)
    if as_json:
        write_json({"ok": True, "checks": lines})
    else:
        write("".join(f"{line}\n" for line in lines))
