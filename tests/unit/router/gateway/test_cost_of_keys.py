"""What keys and limits cost a request at its gateway, in calls of Python: they are no machine's."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import FrameType

import pytest
from starlette.datastructures import Headers, MutableHeaders

from router.gateway.limits.charges import Charges
from router.gateway.limits.quotas import RATE_HEADERS
from router.gateway.metrics import Metrics
from router.security.access import FIELD, Access
from router.security.keyring import Keyring
from router.security.keys import Role
from router.security.keys_file import add_key
from router.security.limits import KeyLimits

MAX_CALLS = 230


@pytest.mark.parametrize("num_names", [1, 50])
def test_a_request_is_few_calls_for_any_number_of_keys(tmp_path: Path, num_names: int) -> None:
    """Its check, its charge and its headers."""
    file = tmp_path / "keys.yaml"
    limits = KeyLimits(requests_per_s=1e6, tokens_per_min=10**12, concurrent_tokens=10**9)
    keys = [add_key(file, f"n{i}", [Role.INFERENCE], limits) for i in range(num_names)]
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

    num_calls = 0

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    async def requests() -> None:
        shown = [Headers({FIELD: f"Bearer {key}", "host": "x"}) for key in keys]
        for noted in (None, note):  # a name's first request makes its limits and metrics
            for headers in shown:
                sys.setprofile(noted)
                reply = await request(headers)
                sys.setprofile(None)
                assert reply.keys() == list(RATE_HEADERS)

    asyncio.run(requests())
    assert 0 < num_calls / num_names < MAX_CALLS
