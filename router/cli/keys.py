"""``expertmesh keys``: makes, lists and revokes the keys of a deployment's clients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError, shown
from router.cli.common import AsJson, write, write_json
from router.security.keys import Role, read_document
from router.security.keys_file import add_key, revoke
from router.security.limits import KeyLimits

SHOWN_DIGITS = 12
keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys of clients.")
File = Annotated[Path, typer.Option("--file", help="The file of `security.keys_file`.")]
DEFAULT_FILE = Path("keys.yaml")


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="Who is to have the key.")],
    role: Annotated[
        list[Role] | None, typer.Option(help="What the key is for; repeatable.")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(help="Most requests a second of all keys of the name.")
    ] = None,
    tokens_per_min: Annotated[
        int | None, typer.Option(help="Most tokens a minute of all keys of the name.")
    ] = None,
    concurrent_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of the name's requests under way.")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(help="Its requests have this number or a higher, later one.")
    ] = None,
    file: File = DEFAULT_FILE,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once; the file gets only its hash.

    Example: expertmesh keys new alice --role inference --file keys.yaml

    The file is made if it is not there. A gateway that uses it knows the key after a second or two.
    Without limits, the key has those of the name's other keys.
    """
    roles = role or [Role.INFERENCE]
    limits = _limits(
        requests_per_s=requests_per_s,
        tokens_per_min=tokens_per_min,
        concurrent_tokens=concurrent_tokens,
        priority=priority,
    )
    key = add_key(file, name, roles, limits)
    if as_json:
        write_json({"key": key, "name": name, "roles": roles})
    else:
        write(f"{key}\n")
        sys.stderr.write(f"expertmesh: {file} has the hash of this key; nothing has the key\n")


def _limits(**given: float | None) -> KeyLimits | None:
    """Return the limits that are given, ``None`` where none is; raises :class:`ConfigError`."""
    limits = {name: value for name, value in given.items() if value is not None}
    if not limits:
        return None
    try:
        return KeyLimits.model_validate(limits)
    except ValidationError as error:
        first = error.errors()[0]
        told = first["msg"].replace("Input should be", "must be")
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"{told}; got {shown(first['input'])}", option) from None


@keys.command(name="list")
def list_keys(file: File = DEFAULT_FILE, as_json: AsJson = False) -> None:
    """Show the names, roles, limits and hashes of all keys.

    Example: expertmesh keys list --file keys.yaml
    """
    entries = read_document(file)[0].keys
    if as_json:
        write_json([entry.model_dump(mode="json") for entry in entries], indent=2)
        return
    table = Table("name", "roles", "limits", "SHA-256")
    for entry in entries:
        limits = entry.limits.model_dump(exclude_none=True)
        lines = "\n".join(f"{name} {value:,}" for name, value in limits.items())
        roles = ", ".join(entry.roles)
        table.add_row(entry.name, roles, lines, f"{entry.sha256[:SHOWN_DIGITS]}…")
    Console().print(table)


@keys.command(name="revoke")
def revoke_keys(
    which: Annotated[
        str, typer.Argument(help="A name, or at least 8 digits of a hash's beginning.")
    ],
    file: File = DEFAULT_FILE,
    as_json: AsJson = False,
) -> None:
    """Remove the keys of a name, or one key by its hash; they count no more within seconds.

    Example: expertmesh keys revoke alice --file keys.yaml

    Requests under way go on.
    """
    gone = revoke(file, which)
    if as_json:
        write_json([entry.model_dump(mode="json") for entry in gone], indent=2)
    else:
        for entry in gone:
            write(f"revoked: {entry.name}, {entry.sha256[:SHOWN_DIGITS]}…\n")
