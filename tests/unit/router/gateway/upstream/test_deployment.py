"""A gateway of a former deployment goes on until its successors listen."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from cluster.reports import Samples
from router.gateway.upstream import deployment as module
from router.gateway.upstream.deployment import SUCCESSOR_CHECK_S, Deployment
from tests.unit.virtual_time import run


@pytest.fixture(autouse=True)
def without_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PlacementWatcher", lambda *_, **__: None)


def ended_after(
    answers: Iterator[bool | Exception],
    meanwhile: Callable[[Deployment], Awaitable[None]] | None = None,
) -> float:
    """Return how long a gateway waits where Serve gives these answers in turn."""

    def is_replaced_later() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def work() -> float:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        deployment = Deployment(
            Any, ["m"], "strict", lambda: True, is_replaced_later, Samples, lambda uses: None
        )
        other = None if meanwhile is None else asyncio.create_task(meanwhile(deployment))
        await deployment.wait_for_successors()
        if other is not None:
            await other
        return loop.time() - began_s

    return run(work())


@pytest.mark.parametrize("count", [0, 1, 5])
def test_it_waits_until_all_successors_run_also_while_serve_is_away(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[bool | Exception] = [ConnectionError("gone"), *[True] * count, False]
    answers = iter(told)
    assert ended_after(answers) == pytest.approx((1 + count) * SUCCESSOR_CHECK_S)
    assert not list(answers)
    assert "Serve does not answer (ConnectionError)" in caplog.text


@pytest.mark.parametrize("end", [Deployment.end_requests, Deployment.refuse_new_requests])
def test_a_deletion_ends_the_wait(end: Callable[[Deployment], None]) -> None:
    async def delete(deployment: Deployment) -> None:
        await asyncio.sleep(60.0)
        end(deployment)

    waited_s = ended_after(itertools.repeat(True), delete)
    assert 60.0 <= waited_s <= 60.0 + SUCCESSOR_CHECK_S
