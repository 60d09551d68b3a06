"""What the commands share: exit codes, errors as one line, options, writing.

A new command is a module with one function, and a line in ``app.py``. What it needs of torch, ray
or transformers is imported inside the function: every command imports all modules here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from cluster.errors import CheckpointError, ConfigError, ExpertMeshError
from router.client import UnreachableError

REFUSED, BAD_USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

Address = Annotated[
    str, typer.Option(envvar="EXPERTMESH_ADDRESS", help="host:port of the gRPC gateway.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code; ``app.py`` puts it around all commands.

    Wrong configurations and checkpoints are 2, no server 3, Ctrl-C 130, every other error 1.
    """
    try:
        yield
    except UnreachableError as error:
        fail(f"{error}; is `serve run` running?", UNREACHABLE)
    except (ConfigError, CheckpointError) as error:
        fail(str(error), BAD_USAGE)
    except ExpertMeshError as error:
        fail(str(error), REFUSED)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def fail(message: str, code: int) -> NoReturn:
    """End the command with one line on stderr and this exit code."""
    sys.stderr.write(f"expertmesh: {' '.join(message.split())}\n")
    raise typer.Exit(code)


def write(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any, indent: int | None = None) -> None:
    """Write a value as JSON and a line's end."""
    write(json.dumps(value, indent=indent) + "\n")
