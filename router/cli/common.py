"""The common parts of the commands: exit codes, errors as one line, options, output.

A new command is a module with a function, and its name in ``app.py``. The function imports torch,
ray and transformers, not the module: each command line imports the modules of all commands.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cluster.errors import CheckpointError, ConfigError, ExpertMeshError
from cluster.private_file import exposure
from router.client import DEFAULT_ADDRESS, Client, UnreachableError

MAX_KEY_FILE_CHARS = 1024
REFUSED, BAD_USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
# A model's text must not move the cursor of a terminal, nor change its colours or its title.
_CONTROLS = {code: "�" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def fail(message: str, code: int) -> NoReturn:
    """End the command with a line on stderr and this exit code."""
    sys.stderr.write(f"expertmesh: {' '.join(message.split())}\n")
    raise typer.Exit(code)


def _checked_address(given: str | None) -> str | None:
    if given is None:
        return None
    host, _, port = given.rpartition(":")
    is_host = bool(host) and "/" not in host and (":" not in host or host.startswith("["))
    if not (is_host and port.isdecimal() and 0 < int(port) < 2**16):
        fail(f"--address: must be host:port, as {DEFAULT_ADDRESS}; got {given!r}", BAD_USAGE)
    return given


def _read_key(file: str | None) -> str | None:
    """Return the key in a file, which may end with a line feed; no message has a part of it."""
    if file is None:
        return None
    try:
        if Path(file).is_file() and (reason := exposure(Path(file))):  # it may be a pipe
            fail(f"--api-key-file: {file} {reason}", BAD_USAGE)
        with open(file, encoding="utf-8") as opened:
            key = opened.read(MAX_KEY_FILE_CHARS + 1).strip()
    except OSError as error:
        fail(f"--api-key-file: {file} cannot be read: {error.strerror}", BAD_USAGE)
    except UnicodeDecodeError:
        fail(f"--api-key-file: {file} is not UTF-8", BAD_USAGE)
    if not key or len(key) > MAX_KEY_FILE_CHARS or len(key.split()) > 1:
        fail(f"--api-key-file: {file} must have one key and nothing else", BAD_USAGE)
    return key


Address = Annotated[
    str,
    typer.Option(
        envvar="EXPERTMESH_ADDRESS",
        callback=_checked_address,
        help="host:port of the gRPC gateway.",
    ),
]
AdminAddress = Annotated[
    str | None,
    typer.Option(
        envvar="EXPERTMESH_ADMIN_ADDRESS",
        callback=_checked_address,
        help="host:port for operators; by default the port after --address.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key-file",
        callback=_read_key,
        metavar="FILE",
        help="A file with the key to show; by default the key is that of EXPERTMESH_API_KEY.",
    ),
]
TlsAuthority = Annotated[
    str | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        help="Encrypt: the authority of the server's certificate; else EXPERTMESH_TLS_CA.",
    ),
]
TlsCertificate = Annotated[
    str | None,
    typer.Option(
        "--tls-cert",
        metavar="FILE",
        help="A certificate to show, where the server asks; else EXPERTMESH_TLS_CERT.",
    ),
]
TlsKey = Annotated[
    str | None,
    typer.Option(
        "--tls-key", metavar="FILE", help="The key of --tls-cert; else EXPERTMESH_TLS_KEY."
    ),
]
Model = Annotated[str, typer.Option(help="Model id; by default the first served model.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Sample from this share of the probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds that an answer may take.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def operator(address: str, admin_address: str | None, api_key: str | None) -> Client:
    """Return the client of an operator's command, whose calls are made once."""
    return Client(address, retry=None, api_key=api_key, admin_address=admin_address)


@contextmanager
def variables(given: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process while a command runs."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error of a command into a line on stderr and an exit code.

    A wrong configuration or checkpoint is 2, no server 3, Ctrl-C 130, any other error 1.
    """
    try:
        yield
    except UnreachableError as error:
        fail(f"{error}; is `expertmesh serve` running?", UNREACHABLE)
    except (ConfigError, CheckpointError) as error:
        fail(str(error), BAD_USAGE)
    except ExpertMeshError as error:
        fail(str(error), REFUSED)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def check_picture(option: str, file: Path | None, formats: Sequence[str] = ()) -> None:
    """End a command before its work where matplotlib could not draw to the file of an option."""
    if file is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        fail(f"{option}: needs matplotlib: pip install 'expertmesh[plots]'", BAD_USAGE)
    allowed = formats or sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in allowed:
        fail(f"{option}: {file}: the suffix must be one of {', '.join(allowed)}", BAD_USAGE)
    if not file.absolute().parent.is_dir():
        fail(f"{option}: {file}: the folder does not exist", BAD_USAGE)


def write(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Return a model's text as a terminal may have it: without control characters."""
    return text.translate(_CONTROLS)


def write_generated(text: str) -> None:
    """Write a model's text to stdout at once; a terminal gets no control characters."""
    write(printable(text) if sys.stdout.isatty() else text)


def write_json(value: Any, indent: int | None = None) -> None:
    """Write a value as JSON and a line feed."""
    write(json.dumps(value, indent=indent, default=str) + "\n")
