"""Runs many seeds in worker processes, each of which imports the product once.

A run is a function of its seed where ``PYTHONHASHSEED`` is 0, since sets of strings have an order;
the workers get it so.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

HASH_SEED = "0"
LIMIT_S = 180.0
"""How long a seed may take on the real machine."""
RUNS = "the world runs"
"""The law that is broken where a run raises, or does not end."""


class TooLongError(KeyboardInterrupt):
    """A run does not end; event loops pass this on."""


@dataclass(frozen=True)
class Found:
    """What came of a seed: the breaches as (law, world's time in seconds, text).

    ``hit`` has the kinds of events that hit, ``cpu_s`` the processor time of the run.
    """

    seed: int
    breaches: tuple[tuple[str, float, str], ...]
    hit: tuple[str, ...]
    digest: int
    num_callbacks: int
    num_tokens: int
    num_requests: int
    cpu_s: float

    def laws(self) -> set[str]:
        return {law for law, _, _ in self.breaches}


def prepare() -> None:
    """Import what a run needs, and have it left alone by the collector of garbage.

    A collection that looks at all of torch and Ray takes a tenth of a second. A world ends by a
    collection of its own, which finds the world alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends
    threading.Thread(target=_end_with_parent, args=(os._exit,), daemon=True).start()
    import torch

    importlib.import_module("tests.world.world")
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda raised: None
    warnings.simplefilter("ignore")  # the end of a world awaits no coroutine of it
    gc.collect()
    gc.freeze()
    gc.disable()


def _end_with_parent(end: Callable[[int], object]) -> None:
    """Wait for the end of the parent, if any; ``end`` is no world's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        end(1)


@contextlib.contextmanager
def _limited(limit_s: float) -> Iterator[None]:
    """Raise :class:`TooLongError` inside after a time, and at the end where that was caught."""
    late: list[TooLongError] = []

    def too_long(*_: object) -> None:
        late.append(TooLongError(f"the run took more than {limit_s:g} s"))
        raise late[-1]

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    if late:
        raise late[-1]


def judged(scenario: Any, limit_s: float = LIMIT_S) -> Found:
    """Run a scenario, in a process that is prepared; whatever it raises is a breach."""
    from tests.world.world import run

    begun_s = process_time()
    try:
        with _limited(limit_s):
            outcome = run(scenario)
    except (Exception, TooLongError) as error:
        told = "".join(traceback.format_exception(error)[-8:])
        cpu_s = process_time() - begun_s
        return Found(scenario.seed, ((RUNS, 0.0, told),), (), 0, 0, 0, len(scenario.plans), cpu_s)
    return Found(
        scenario.seed,
        tuple((breach.law, breach.at_s, breach.text) for breach in outcome.breaches),
        tuple(event.kind for event in outcome.hit),
        outcome.digest,
        outcome.num_callbacks,
        outcome.num_tokens,
        len(scenario.plans),
        process_time() - begun_s,
    )


def found_of(seed: int) -> Found:
    """Run a seed, in a process that is prepared."""
    from tests.world.weather import draw

    return judged(draw(seed))


@contextlib.contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of prepared processes; its calls that have not begun are dropped at the end."""
    names = ("PYTHONHASHSEED", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({"PYTHONHASHSEED": HASH_SEED, "OMP_NUM_THREADS": "1"})
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), prepare)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def all_of(
    pool: ProcessPoolExecutor,
    processes: int,
    seeds: Iterator[int],
    until_s: float,
    call: Callable[[int], Found] = found_of,
) -> Iterator[Found]:
    """Yield what came of each seed, as they end; none begins after ``until_s``.

    ``until_s`` is a time of ``time.perf_counter``.
    """
    running: set[Future[Found]] = set()
    while True:
        while len(running) < 2 * processes and perf_counter() < until_s:
            seed = next(seeds, None)
            if seed is None:
                break
            running.add(pool.submit(call, seed))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for one in done:
            yield one.result()
