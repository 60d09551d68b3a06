"""Faults one after another and on top of each other, while requests never stop coming."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from cluster.reports import ActorStatus
from tests.cluster_fixture import RANDOM, ServedCluster, greedy, wait_until
from tests.fault.faults import PROMPTS, SHARED, SHARED_PROMPTS, expected_tokens, kill

WORKERS, LENGTH = 3, 12
REPLACED_S, BACK_S = 30.0, 45.0


@contextmanager
def steady_load(served: ServedCluster) -> Iterator[list[int]]:
    """Ask again and again while the block runs; every answer must come and be the right one.

    Yields a list that grows with every answer, by the tokens of its prompt that the router had
    kept. transformers, which keeps none, has the same tokens.
    """
    prompts = [*PROMPTS, *SHARED_PROMPTS]
    expected = [
        *(tokens[:LENGTH] for tokens in expected_tokens(served)),
        *(served.expected(prompt, LENGTH) for prompt in SHARED_PROMPTS),
    ]
    ended = threading.Event()
    answered: list[int] = []

    def ask(worker: int) -> None:
        while not ended.is_set():
            for place in range(worker, len(prompts), WORKERS):
                [reply] = served.client.generate(prompts[place], greedy(LENGTH), model=RANDOM)
                assert reply.token_ids == expected[place]
                assert reply.usage is not None
                answered.append(reply.usage.cached_tokens)

    with ThreadPoolExecutor(WORKERS) as pool:
        workers = [pool.submit(ask, worker) for worker in range(WORKERS)]
        try:
            yield answered
        finally:
            ended.set()
    for worker in workers:
        worker.result()


def wait_answers(answered: list[int], count: int) -> None:
    """Wait for so many more answers."""
    wanted = len(answered) + count
    wait_until(lambda: len(answered) >= wanted, f"{count} more answers", REPLACED_S)


def wait_replaced(served: ServedCluster, old: ActorStatus, timeout_s: float) -> ActorStatus:
    """Wait until another process of a later generation is there for a killed actor."""
    new = wait_until(
        lambda: next(
            (a for i, a in served.actors().items() if i == old.actor_id and a.pid != old.pid), None
        ),
        f"{old.actor_id} is replaced",
        timeout_s,
    )
    assert new is not None
    assert new.generation > old.generation
    return new


def test_no_request_fails_while_every_actor_is_killed_in_turn(served: ServedCluster) -> None:
    told = served.status()
    with steady_load(served) as answered:
        wait_answers(answered, WORKERS)
        for victim in told.actors:
            kill(told, victim.pid)
            assert wait_replaced(served, victim, REPLACED_S).experts == victim.experts
            since = len(answered)
            wait_answers(answered, len(PROMPTS) + len(SHARED_PROMPTS))
            # Which of the prompts that share a beginning come first, and together, is chance.
            wait_until(
                lambda since=since: max(answered[since:]) == len(SHARED),
                "the shared beginning is kept",
                REPLACED_S,
            )
    after = served.wait_whole()
    assert not {a.pid for a in after.actors} & {a.pid for a in told.actors}
    assert (after.controller_pid, after.routers) == (told.controller_pid, told.routers)


def test_requests_survive_the_loss_of_the_controller_and_every_actor(
    served: ServedCluster,
) -> None:
    told = served.status()
    with steady_load(served) as answered:
        wait_answers(answered, WORKERS)
        kill(told, told.controller_pid, *(actor.pid for actor in told.actors))
        for victim in told.actors:
            wait_replaced(served, victim, BACK_S)
        wait_answers(answered, WORKERS)
    after = served.wait_whole()
    assert after.epoch > told.epoch
