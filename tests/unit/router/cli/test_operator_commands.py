"""``expertmesh load``, ``placement``, ``rebalance``, ``scale``, ``drain`` and ``copies``."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace

import pytest

from cluster.errors import InvalidRequestError, UnavailableError
from router.client import AsyncClient, Client
from tests.unit.gateway_fakes import CHANGED, LOAD, REBALANCED, FakeUpstream
from tests.unit.router.cli.test_cli import run

pytestmark = pytest.mark.usefixtures("address")


def test_both_clients_bring_everything_to_the_controller_and_back(
    address: str, upstream: FakeUpstream
) -> None:
    expected = [LOAD, REBALANCED, CHANGED, CHANGED, CHANGED]

    async def ask() -> list[object]:
        async with AsyncClient(address) as client:
            return [
                await client.load(),
                await client.rebalance(dry_run=True),
                await client.scale(3, "gpu", dry_run=True),
                await client.drain("a0"),
                await client.set_copies("tiny", 1, 5, 2),
            ]

    assert asyncio.run(ask()) == expected
    asked = upstream.controller.calls[:]
    assert asked == [
        ("load",),
        ("rebalance", True),
        ("scale", 3, "gpu", True),
        ("drain", "a0", False),
        ("set_copies", "tiny", 1, 5, 2, False, False),
    ]
    with Client(address) as client:
        told = [client.load(), client.rebalance(dry_run=True), client.scale(3, "gpu", dry_run=True)]
        assert [*told, client.drain("a0"), client.set_copies("tiny", 1, 5, 2)] == expected
    assert upstream.controller.calls == 2 * asked


def test_load_shows_devices_the_busiest_experts_and_the_last_changes() -> None:
    result = run("load", "--top", "1")
    assert result.exit_code == 0
    assert "balance: 1.50 by layer, 1.25 in all" in result.stdout
    assert "last rebalancing: committed, 1 copies moved" in result.stdout
    assert "last change: expert: 1 -> 2 actors: committed, " in result.stdout
    assert "(asked for)" in result.stdout
    lines = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["a0", "n1", "2", "120", "25%", "2.00", "ms"] in lines
    assert ["tiny", "0", "1", "90", "a0"] in lines
    assert ["tiny", "0", "0", "20", "a0,", "a1"] not in lines
    assert json.loads(run("load", "--json").stdout) == json.loads(json.dumps(asdict(LOAD)))


def test_placement_shows_who_holds_what() -> None:
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in run("placement").stdout.splitlines()
    ]
    assert ["tiny", "0", "0-1", "0, 2-3", ""] in lines
    assert ["tiny", "1", "", "", "0"] in lines
    assert json.loads(run("placement", "--json").stdout)[0]["actors"] == ["a0", "a1"]


def test_rebalance_shows_what_it_did(upstream: FakeUpstream) -> None:
    result = run("rebalance", "--dry-run")
    assert (result.exit_code, upstream.controller.calls) == (0, [("rebalance", True)])
    assert "balance by layer 1.50 -> 1.00, in all 1.25 -> 0.00; 2.5 MB loaded" in result.stdout
    assert "to a1" in result.stdout
    assert "from a0" in result.stdout
    told = json.loads(run("rebalance", "--json").stdout)
    assert told == json.loads(json.dumps(asdict(REBALANCED)))
    assert upstream.controller.calls == [("rebalance", True), ("rebalance", False)]


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("scale 2", ("scale", 2, "", False)),
        ("scale 2 --pool gpu --dry-run", ("scale", 2, "gpu", True)),
        ("drain a0", ("drain", "a0", False)),
        ("drain 0a1b2c --dry-run", ("drain", "0a1b2c", True)),
        ("copies tiny 1 5 3", ("set_copies", "tiny", 1, 5, 3, False, False)),
        ("copies tiny 1 5 3 --dry-run", ("set_copies", "tiny", 1, 5, 3, True, False)),
        ("copies tiny all 3", ("set_copies", "tiny", 0, 0, 3, False, True)),
    ],
)
def test_a_command_shows_what_was_done(
    upstream: FakeUpstream, command: str, asked: tuple[object, ...]
) -> None:
    result = run(*command.split())
    assert (result.exit_code, upstream.controller.calls) == (0, [asked])
    assert "expert: 1 -> 2 actors: committed in 0.50 s; +a1 actors, 2.5 MB" in result.stdout
    assert "to a1" in result.stdout
    told = json.loads(run(*command.split(), "--json").stdout)
    assert told == json.loads(json.dumps(asdict(CHANGED)))


@pytest.mark.parametrize(
    ("command", "outcome"),
    [
        ("rebalance", "failed: a1 died"),
        ("scale 2", "failed: a1 died"),
        ("scale 2", "pending: a1: it needs GPU 1"),
    ],
)
def test_what_is_not_done_is_exit_code_1(
    upstream: FakeUpstream, command: str, outcome: str
) -> None:
    upstream.controller.rebalanced = replace(REBALANCED, outcome=outcome, moves=())
    upstream.controller.changed = replace(CHANGED, outcome=outcome, moves=())
    result = run(*command.split())
    assert (result.exit_code, outcome in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("command", "refusal", "told"),
    [
        ("rebalance", UnavailableError("not while a1 is away", "", 1.0), "not while a1 is away"),
        (
            "scale 9",
            InvalidRequestError("must be from 1 to 4 (given: 9)", "actors"),
            "actors: must be from 1 to 4 (given: 9)",
        ),
    ],
)
def test_what_is_refused_is_exit_code_1(
    upstream: FakeUpstream, command: str, refusal: Exception, told: str
) -> None:
    upstream.controller.refusal = refusal
    result = run(*command.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr
