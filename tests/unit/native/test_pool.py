"""The threads of native code: whatever their number, whoever calls, whatever becomes of them.

An expert's products stand for all shared work. Most tests have a process of their own, forked from
one that has no worker: workers live as long as their process, and one that waits forever must not
take the other tests along.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cluster import native as built
from cluster.wire.tensors import to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.native_ffn import NativeFfn
from tests.arrays import on_host
from tests.unit.router.model.cpu.attention_cases import make, one_prefill

BUILT = [] if built.native is None else [built.native]
HIDDEN, INNER, NUM_ROWS = 256, 1024, 90  # enough for five threads to be worthwhile
CHECK_S, ALL_S = 40.0, 100.0


def expert_of() -> NativeFfn:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(HIDDEN, INNER, generator=generator) * INNER**-0.5
    return NativeFfn(on_host(GatedFfnWeights(gate_up, down)), "silu", 1)


def rows_of(count: int = NUM_ROWS) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))


def computed(expert: NativeFfn, rows: torch.Tensor, threads: int) -> torch.Tensor:
    assert built.native is not None
    output = torch.full_like(rows, torch.nan)
    built.native.ffn(
        to_bytes(rows), (len(rows),), (expert.packed,), to_bytes(output), expert.shape, threads,
        None,
    )  # fmt: skip
    return output


WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t)


def pool_run() -> Callable[..., None]:
    assert built.native is not None
    run = ctypes.CDLL(built.native.__file__).pool_run
    run.argtypes = [WORK, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_ssize_t]
    run.restype = None
    return run


@pytest.mark.parametrize("native", BUILT)
def test_each_index_is_computed_once_on_so_many_threads_at_most(native: ModuleType) -> None:
    run = pool_run()
    lock = threading.Lock()
    indices: list[int] = []
    now, most = 0, 0

    @WORK
    def work(context: int | None, index: int) -> None:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
            indices.append(index)
        time.sleep(0.02)
        with lock:
            now -= 1

    for threads, count in ((6, 12), (2, 12), (1, 3), (4, 2), (3, 0), (0, 2)):
        run(work, None, count, threads)
        assert (sorted(indices), now) == (list(range(count)), 0)
        assert most <= max(1, min(threads, count))
        most = 0
        indices.clear()


def in_a_fork(check: Callable[[], object]) -> object:
    """Return what a function returns in a copy of this process, which must have no worker yet."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(CHECK_S, exit=True)
        try:
            os.write(writer, json.dumps(check()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else "it failed"


def print_all() -> None:
    """Print what each check returns in a process of its own, as JSON."""
    torch.set_num_threads(1)
    print(json.dumps({check.__name__: in_a_fork(check) for check in CHECKS}))


@pytest.fixture(scope="module", params=BUILT)
def found() -> dict[str, object]:
    """What the checks return; one process imports all that they need, and forks for each."""
    program = f"from {__name__} import print_all; print_all()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=ALL_S
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return dict(json.loads(done.stdout))


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def counted_calls() -> list[int]:
    """Return how many calls 500,000 indices have, by the C library's semaphore.

    The interpreter's lock would keep its threads apart. Here they meet, on processors of their own.
    """
    assert built.native is not None
    libc, run, found = ctypes.CDLL(None), pool_run(), ctypes.c_int()
    count, semaphore = WORK(("sem_post", libc)), ctypes.create_string_buffer(64)
    libc.sem_init(semaphore, 0, 0)
    run(count, semaphore, 4, 4)
    processors = sorted(os.sched_getaffinity(0))
    for place, thread in enumerate(os.listdir("/proc/self/task")):
        os.sched_setaffinity(int(thread), {processors[place % len(processors)]})
    counts = []
    for _ in range(5):
        libc.sem_init(semaphore, 0, 0)
        run(count, semaphore, 500_000, 4)
        libc.sem_getvalue(semaphore, ctypes.byref(found))
        counts.append(found.value)
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), processors)
    return counts


def callers_at_once() -> bool:
    expert = expert_of()
    samples = [rows_of(count) for count in (1, 12, 60, 90)] * 2
    expected = [computed(expert, rows, 1) for rows in samples]

    def keep_computing(number: int) -> bool:
        rows, right = samples[number], expected[number]
        return all(torch.equal(computed(expert, rows, 2 + turn % 4), right) for turn in range(300))

    with ThreadPoolExecutor(len(samples)) as callers:
        return all(callers.map(keep_computing, range(len(samples))))


def forks() -> list[object]:
    """Fork with workers that sleep, then with workers that compute; children compute too."""
    expert, rows = expert_of(), rows_of()
    right = computed(expert, rows, 1)
    assert torch.equal(computed(expert, rows, 5), right)
    is_over = threading.Event()

    def keep_computing() -> None:
        while not is_over.is_set():
            computed(expert, rows, 3)

    def forked() -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            signal.alarm(20)
            before = num_threads()
            is_right = all(torch.equal(computed(expert, rows, 5), right) for _ in range(2))
            os._exit(0 if is_right and (before, num_threads()) == (1, 5) else 1)
        finally:
            os._exit(2)

    codes = {forked()}
    busy = [threading.Thread(target=keep_computing) for _ in range(2)]
    for thread in busy:
        thread.start()
    codes |= {forked() for _ in range(30)}
    is_over.set()
    for thread in busy:
        thread.join()
    return [sorted(codes), torch.equal(computed(expert, rows, 5), right)]


def no_thread_to_be_had() -> list[object]:
    expert, rows = expert_of(), rows_of()
    right, before = computed(expert, rows, 1), num_threads()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match="start new thread"):
        threading.Thread(target=print).start()
    is_right = torch.equal(computed(expert, rows, 5), right)
    without = num_threads() - before
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    is_right &= torch.equal(computed(expert, rows, 5), right)
    return [is_right, without, num_threads() - before]


def idle_workers() -> list[object]:
    """Return how many there are after calls, processor seconds of a pause, and their signals."""
    expert, rows, before = expert_of(), rows_of(), set(os.listdir("/proc/self/task"))
    for threads in (2, 4, 3, 4):
        computed(expert, rows, threads)
    began_s = time.process_time()
    time.sleep(0.5)
    used_s = time.process_time() - began_s
    workers = set(os.listdir("/proc/self/task")) - before
    blocked = [
        int(line.split()[1], 16)
        for worker in workers
        for line in Path(f"/proc/self/task/{worker}/status").read_text().splitlines()
        if line.startswith("SigBlk")
    ]
    terminate, fault = 1 << signal.SIGTERM - 1, 1 << signal.SIGSEGV - 1
    are_right = all(mask & terminate and not mask & fault for mask in blocked)
    return [len(workers), used_s, are_right]


def attending_threads() -> list[int]:
    """Return how many workers there are after attention with one thread, with 3, with 3 again."""
    case = make(4, lengths=[700], dtype=torch.bfloat16, num_kv=4, heads=8, size=128)
    before, found = num_threads(), []
    for threads in (1, 3, 3):
        case.run(one_prefill(case), threads=threads)
        found.append(num_threads() - before)
    return found


CHECKS = (
    attending_threads,
    counted_calls,
    callers_at_once,
    forks,
    no_thread_to_be_had,
    idle_workers,
)


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("attending_threads", [0, 2, 2]),
        ("counted_calls", [500_000] * 5),  # no index is taken twice
        ("callers_at_once", True),
        ("forks", [[0], True]),
        ("no_thread_to_be_had", [True, 0, 4]),
    ],
)
def test_workers_compute_each_index_once_for_whoever_calls(
    found: dict[str, object], check: str, expected: object
) -> None:
    assert found[check] == expected


def test_idle_workers_sleep_and_leave_signals_to_others(found: dict[str, object]) -> None:
    count, used_s, are_right = found["idle_workers"]
    assert (count, are_right) == (3, True)
    assert used_s < 0.1
