"""``expertmesh usage``: shows what the keys of each name have used."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from router.cli.common import Address, AdminAddress, ApiKey, AsJson, operator, write_json
from router.client import DEFAULT_ADDRESS


def usage(
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the requests and tokens of each key's name, and what its limits refused.

    Example: expertmesh usage --api-key-file ops.key

    Each gateway counts from its own start; the numbers of gateways that have ended are gone.
    """
    with operator(address, admin_address, api_key) as client:
        report = client.usage()
    if as_json:
        write_json(asdict(report), indent=2)
        return
    table = Table("name")
    for column in ("requests", "prompt tokens", "generated tokens", "rows", "refused"):
        table.add_column(column, justify="right")
    for key in report.keys:
        name, *numbers = asdict(key).values()
        table.add_row(name, *(f"{number:,}" for number in numbers))
    Console().print(table)
