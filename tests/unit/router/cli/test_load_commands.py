"""``expertmesh load``, ``placement`` and ``rebalance`` against a real gRPC server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace

from cluster.errors import UnavailableError
from router.client import AsyncClient, Client
from tests.unit.gateway_fakes import LOAD, REBALANCED, FakeUpstream
from tests.unit.router.cli.test_cli import run


def test_both_clients_get_all_that_the_controller_tells(
    address: str, upstream: FakeUpstream
) -> None:
    async def ask() -> tuple[object, object]:
        async with AsyncClient(address) as client:
            return await client.load(), await client.rebalance()

    assert asyncio.run(ask()) == (LOAD, REBALANCED)
    with Client(address) as client:
        assert (client.load(), client.rebalance(dry_run=True)) == (LOAD, REBALANCED)
    asked = [("load",), ("rebalance", False), ("load",), ("rebalance", True)]
    assert upstream.controller.calls == asked


def test_load_shows_devices_and_the_busiest_experts(address: str) -> None:
    result = run("load", "--top", "1", "--address", address)
    assert result.exit_code == 0
    assert "balance: 1.50 by layer, 1.25 in all" in result.stdout
    assert "last rebalancing: committed, 1 copies moved" in result.stdout
    assert "last change: expert: 1 -> 2 actors: committed, " in result.stdout
    assert "(asked for)" in result.stdout
    lines = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["a0", "n1", "2", "120", "25%", "2.00", "ms"] in lines
    assert ["tiny", "0", "1", "90", "a0"] in lines
    assert ["tiny", "0", "0", "20", "a0,", "a1"] not in lines
    told = json.loads(run("load", "--json", "--address", address).stdout)
    assert told == json.loads(json.dumps(asdict(LOAD)))


def test_placement_shows_who_holds_what(address: str) -> None:
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in run("placement", "--address", address).stdout.splitlines()
    ]
    assert ["tiny", "0", "0-1", "0, 2-3", ""] in lines
    assert ["tiny", "1", "", "", "0"] in lines
    told = json.loads(run("placement", "--json", "--address", address).stdout)
    assert told[0]["actors"] == ["a0", "a1"]


def test_rebalance_shows_what_it_did(address: str, upstream: FakeUpstream) -> None:
    result = run("rebalance", "--dry-run", "--address", address)
    assert (result.exit_code, upstream.controller.calls) == (0, [("rebalance", True)])
    assert "balance by layer 1.50 -> 1.00, in all 1.25 -> 0.00; 2.5 MB loaded" in result.stdout
    assert "to a1" in result.stdout
    assert "from a0" in result.stdout
    told = json.loads(run("rebalance", "--json", "--address", address).stdout)
    assert told == json.loads(json.dumps(asdict(REBALANCED)))
    assert upstream.controller.calls == [("rebalance", True), ("rebalance", False)]


def test_a_rebalancing_that_is_refused_or_fails_is_exit_code_1(
    address: str, upstream: FakeUpstream
) -> None:
    upstream.controller.rebalanced = replace(REBALANCED, outcome="failed: a1 died", moves=())
    result = run("rebalance", "--address", address)
    assert (result.exit_code, "failed: a1 died" in result.stderr) == (1, True)
    upstream.controller.refusal = UnavailableError("copies are not moved while a1 is away", "", 1.0)
    result = run("rebalance", "--address", address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "while a1 is away" in result.stderr
