"""``expertmesh usage``: from the counts of gateways to a table and to JSON."""

from __future__ import annotations

import asyncio
import json

import pytest

from cluster.errors import OverloadedError, UnavailableError
from cluster.reports import KeyUsage, Measurements, ProcessSamples, ProcessStatus, UsageReport
from router.client import AsyncClient, Client
from router.gateway.admin import usage_of
from router.gateway.limits.charges import Charges
from router.gateway.metrics import Metrics
from router.security.keys import Caller, Role
from router.security.limits import KeyLimits
from tests.unit.gateway_fakes import FakeUpstream, Servicer, says, serve_grpc
from tests.unit.router.cli.test_cli import NOBODY, run

ALICE = Caller("alice", frozenset(Role), KeyLimits(concurrent_tokens=100))
BOB = Caller("bob", frozenset(Role))


def used(charges: Charges) -> None:
    """Two calls of bob's, one of alice's, and two of hers that are refused."""
    for _ in range(2):
        charges.begin(BOB)
        with charges.charge(BOB, 5):
            pass
    charges.begin(ALICE)
    with charges.charge(ALICE, 60) as charge:
        for _ in range(2):
            charges.begin(ALICE)
            with pytest.raises(OverloadedError, match="concurrent_tokens"):
                charges.charge(ALICE, 60)
        charge.use("prompt", 1500)
        charge.use("generated", 20)


def test_counts_are_summed_over_gateways_and_names() -> None:
    processes = []
    for pid in (1, 2):
        metrics = Metrics()
        charges = Charges(metrics)
        used(charges)
        process = ProcessStatus(pid, "n")
        processes.append(ProcessSamples("gateway", process, metrics.samples()))
    processes.append(ProcessSamples("router", ProcessStatus(3, "n"), Metrics().samples()))
    assert usage_of(Measurements(None, (), tuple(processes))) == UsageReport(
        2, (KeyUsage("alice", 6, 3000, 40, 0, 4), KeyUsage("bob", 4, 0, 0, 0, 0))
    )


def test_both_clients_and_the_command_show_what_keys_have_used() -> None:
    upstream = FakeUpstream(says(""))
    servicer = Servicer(upstream)
    charges = servicer.methods.service.charges
    used(charges)
    charges.begin(BOB)
    with charges.charge(BOB, 7) as charge:
        charge.use("rows", 7)
    expected = UsageReport(
        1, (KeyUsage("alice", 3, 1500, 20, 0, 2), KeyUsage("bob", 3, 0, 0, 7, 0))
    )

    async def ask(address: str) -> UsageReport:
        async with AsyncClient(address) as client:
            return await client.usage()

    with serve_grpc(servicer) as address:
        assert asyncio.run(ask(address)) == expected
        with Client(address) as client:
            assert client.usage() == expected
        shown = run("usage", "--address", address)
        told = json.loads(run("usage", "--json", "--address", address).stdout)
        upstream.controller.is_away = True
        with Client(address) as client, pytest.raises(UnavailableError, match="the controller"):
            client.usage()  # the asked gateway's own numbers are not those of all
    assert shown.exit_code == 0
    rows = [line.split() for line in shown.stdout.splitlines() if "alice" in line or "bob" in line]
    assert [[word for word in row if word != "│"] for row in rows] == [
        ["alice", "3", "1,500", "20", "0", "2"],
        ["bob", "3", "0", "0", "7", "0"],
    ]
    assert told["gateways"] == 1
    assert told["keys"][1] == {
        "name": "bob", "requests": 3, "prompt_tokens": 0, "generated_tokens": 0, "rows": 7,
        "refused": 0,
    }  # fmt: skip


def test_without_a_server_usage_is_exit_code_3() -> None:
    assert run("usage", "--address", NOBODY).exit_code == 3
