"""What keys and limits cost a request at its gateway, in processor time."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders

from router.gateway.charges import Charges
from router.gateway.metrics import Metrics
from router.gateway.quotas import RATE_HEADERS
from router.security.access import FIELD, Access
from router.security.keyring import Keyring
from router.security.keys import Role
from router.security.keys_file import add_key
from router.security.limits import KeyLimits

REQUESTS, NAMES = 2000, 50
MOST_S = 50e-6


def test_check_charge_and_headers_of_a_request_cost_little(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    limits = KeyLimits(requests_per_s=1e6, tokens_per_min=10**12, concurrent_tokens=10**9)
    keys = [add_key(file, f"n{i}", [Role.INFERENCE], limits) for i in range(NAMES)]
    metrics = Metrics()
    access, charges = Access(Keyring(file), metrics.refused_caller), Charges(metrics)

    async def request(headers: Headers) -> MutableHeaders:
        caller = await access.admit("http", headers.getlist(FIELD), Role.INFERENCE)
        with charges.charge(caller, 100) as charge:
            charge.use("prompt", 50)
            charge.use("generated", 40)
        reply = MutableHeaders(raw=[])
        reply.update(charges.headers(caller))
        return reply

    async def times_s() -> list[float]:
        shown = [Headers({FIELD: f"Bearer {key}", "host": "x"}) for key in keys]
        taken_s = []
        for number in range(REQUESTS):
            began_s = time.process_time()
            reply = await request(shown[number % NAMES])
            taken_s.append(time.process_time() - began_s)
            assert reply.keys() == list(RATE_HEADERS)
        return taken_s

    assert statistics.median(asyncio.run(times_s())) < MOST_S
