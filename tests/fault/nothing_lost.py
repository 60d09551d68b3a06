"""Load on the cluster, of which every answer must come and be right whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.cluster_fixture import RANDOM, ServedCluster, wait_until
from tests.fault.faults import PROMPTS
from tests.fault.load import Case, Load

LENGTH, STREAMS, UNARY = 40, 3, 2
DEADLINE_S, BACK_S = 90.0, 120.0


@contextmanager
def nothing_lost(served: ServedCluster) -> Iterator[Callable[[], None]]:
    """Load the cluster in the body; every answer must come and be right.

    The function given waits until more requests have been answered than can have been under way.
    """
    cases = [Case(tuple(prompt), served.expected(prompt, LENGTH)) for prompt in PROMPTS]
    load = Load(served.client, RANDOM, cases, STREAMS, UNARY, DEADLINE_S)

    def answered() -> None:
        wanted = load.outcome().requests + 2 * (STREAMS + UNARY)
        wait_until(lambda: load.outcome().requests >= wanted, "answers come", BACK_S)

    try:
        answered()
        yield answered
    finally:
        outcome = load.end()
    assert outcome.failures == {}
