"""``expertmesh scale``, ``drain`` and ``copies`` against a real gRPC server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace

import pytest

from cluster.errors import InvalidRequestError
from cluster.reports import ChangeReport
from router.client import AsyncClient, Client
from tests.unit.gateway_fakes import CHANGED, FakeUpstream
from tests.unit.router.cli.test_cli import run


def test_both_clients_bring_everything_to_the_controller_and_back(
    address: str, upstream: FakeUpstream
) -> None:
    async def ask() -> list[ChangeReport]:
        async with AsyncClient(address) as client:
            return [
                await client.scale(3, "gpu", dry_run=True),
                await client.drain("a0"),
                await client.set_copies("tiny", 1, 5, 2),
            ]

    assert asyncio.run(ask()) == [CHANGED] * 3
    asked = upstream.controller.calls[:]
    assert asked == [
        ("scale", 3, "gpu", True), ("drain", "a0", False), ("set_copies", "tiny", 1, 5, 2, False)
    ]  # fmt: skip
    with Client(address) as client:
        assert client.scale(3, "gpu", dry_run=True) == CHANGED
        assert client.drain("a0") == CHANGED
        assert client.set_copies("tiny", 1, 5, 2) == CHANGED
    assert upstream.controller.calls == 2 * asked


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("scale 2", ("scale", 2, "", False)),
        ("scale 2 --pool gpu --dry-run", ("scale", 2, "gpu", True)),
        ("drain a0", ("drain", "a0", False)),
        ("drain 0a1b2c --dry-run", ("drain", "0a1b2c", True)),
        ("copies tiny 1 5 3", ("set_copies", "tiny", 1, 5, 3, False)),
        ("copies tiny 1 5 3 --dry-run", ("set_copies", "tiny", 1, 5, 3, True)),
    ],
)
def test_a_command_shows_what_was_done(
    address: str, upstream: FakeUpstream, command: str, asked: tuple[object, ...]
) -> None:
    result = run(*command.split(), "--address", address)
    assert (result.exit_code, upstream.controller.calls) == (0, [asked])
    assert "expert: 1 -> 2 actors: committed in 0.50 s; +a1 actors, 2.5 MB" in result.stdout
    assert "to a1" in result.stdout
    told = json.loads(run(*command.split(), "--json", "--address", address).stdout)
    assert told == json.loads(json.dumps(asdict(CHANGED)))


@pytest.mark.parametrize("outcome", ["failed: a1 died", "pending: a1: it needs GPU 1"])
def test_what_is_not_done_is_exit_code_1(
    address: str, upstream: FakeUpstream, outcome: str
) -> None:
    upstream.controller.changed = replace(CHANGED, outcome=outcome, moves=())
    result = run("scale", "2", "--address", address)
    assert (result.exit_code, outcome in result.stderr) == (1, True)
    upstream.controller.refusal = InvalidRequestError("must be from 1 to 4 (given: 9)", "actors")
    result = run("scale", "9", "--address", address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "actors: must be from 1 to 4 (given: 9)" in result.stderr
