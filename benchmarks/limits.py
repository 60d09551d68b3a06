"""This machine's limits: memory bandwidth, arithmetic of a thread, a message there and back.

    python -m benchmarks.limits --row-bytes N

``benchmarks.decode`` runs this in a process of its own and computes bounds from it
(:mod:`benchmarks.bound`). All figures are the best of several trials, because a limit is what the
machine can do.
"""

from __future__ import annotations

import argparse
import json
import mmap
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from benchmarks.baseline import run_module

if TYPE_CHECKING:
    import torch

READ_BYTES = 512 << 20
"""More than the last cache of almost all processors."""
MATRIX = 192
"""Three fp32 matrices of this size are 442 KB, which stay in a core's cache."""
TRIALS = 7
TRIAL_S = 0.1
HOPS = 500
"""Messages there and back in a trial."""
DEADLINE_S = 60.0
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Instruction sets that decide the speed of products, on x86 and on ARM."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a machine can do.

    ``one_thread_bytes_per_s`` and ``all_threads_bytes_per_s`` are of reading memory.
    ``flop_per_s`` has, by dtype, a thread's products in its cache; a multiplication and an addition
    count as two. ``hop_s`` is a token's row from one process to another and back.
    """

    threads: int
    one_thread_bytes_per_s: float
    all_threads_bytes_per_s: float
    flop_per_s: dict[str, float]
    hop_s: float


def measure(row_bytes: int) -> Limits:
    """Return the limits, measured in a fresh process; ``row_bytes`` is the size of a message."""
    return Limits(**run_module("benchmarks.limits", ["--row-bytes", str(row_bytes)], {}))


def instructions(cpu_info: str) -> list[str]:
    """Return which of ``INSTRUCTIONS`` Linux says that the processor has."""
    flags: set[str] = set()
    for line in cpu_info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return [name for name in INSTRUCTIONS if name in flags]


def best(found: Sequence[Limits]) -> Limits:
    """Return the best of each limit, of several measurements on one machine."""
    return Limits(
        found[0].threads,
        max(one.one_thread_bytes_per_s for one in found),
        max(one.all_threads_bytes_per_s for one in found),
        {dtype: max(one.flop_per_s[dtype] for one in found) for dtype in found[0].flop_per_s},
        min(one.hop_s for one in found),
    )


def best_s(do: Callable[[], object]) -> float:
    """Return the seconds of one call: the shortest mean of a trial, of ``TRIAL_S`` or longer."""
    shortest_s = float("inf")
    do()
    for _ in range(TRIALS):
        calls, began_s = 0, time.perf_counter()
        while (took_s := time.perf_counter() - began_s) < TRIAL_S:
            do()
            calls += 1
        shortest_s = min(shortest_s, took_s / calls)
    return shortest_s


def read_bytes_per_s(threads: int) -> float:
    """Return how fast so many threads together read memory: torch's sum of a large array.

    The array is in huge pages where the system has them, because these read fastest.
    """
    import torch

    torch.set_num_threads(threads)
    with mmap.mmap(-1, READ_BYTES) as pages:
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
            pages.madvise(mmap.MADV_HUGEPAGE)
        values = torch.frombuffer(pages, dtype=torch.float32)
        values.fill_(1.0)
        took_s = best_s(values.sum)
        del values  # else the pages cannot be closed
    return READ_BYTES / took_s


def product_flop_per_s(dtype: torch.dtype) -> float:
    """Return the arithmetic of one thread: torch's product of two matrices in its cache."""
    import torch

    torch.set_num_threads(1)
    left = torch.full((MATRIX, MATRIX), 0.5, dtype=dtype)
    right, result = left.clone(), left.clone()
    return 2 * MATRIX**3 / best_s(lambda: torch.mm(left, right, out=result))


def hop_s(row_bytes: int) -> float:
    """Return how long a message of ``row_bytes`` takes to another process and back.

    The processes block in a Unix socket, as a router and an actor do, and do nothing else.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    arguments = ["--echo", str(theirs.fileno()), "--row-bytes", str(row_bytes)]
    echo = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.limits", *arguments], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    message, received = bytes(row_bytes), bytearray(row_bytes)

    def there_and_back() -> None:
        for _ in range(HOPS):
            ours.sendall(message)
            _receive(ours, received)

    try:
        return best_s(there_and_back) / HOPS
    finally:
        ours.close()  # which ends the other process
        echo.wait(DEADLINE_S)


def echo(descriptor: int, row_bytes: int) -> None:
    """Answer each message with itself until the socket closes."""
    with socket.socket(fileno=descriptor) as connected:
        received = bytearray(row_bytes)
        while _receive(connected, received):
            connected.sendall(received)


def _receive(connected: socket.socket, buffer: bytearray) -> bool:
    """Fill the buffer; returns whether the other side was there to the end."""
    view = memoryview(buffer)
    while view:
        count = connected.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def run(row_bytes: int) -> Limits:
    """Measure in this process."""
    import psutil
    import torch

    threads = psutil.cpu_count() or 1
    return Limits(
        threads,
        read_bytes_per_s(1),
        read_bytes_per_s(threads),
        {
            "float32": product_flop_per_s(torch.float32),
            "bfloat16": product_flop_per_s(torch.bfloat16),
        },
        hop_s(row_bytes),
    )


def main() -> None:
    """Measure in this process, and print a line of JSON; or be the other end of the messages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row-bytes", type=int, required=True)
    parser.add_argument("--echo", type=int, metavar="DESCRIPTOR")
    options = parser.parse_args()
    if options.echo is not None:
        echo(options.echo, options.row_bytes)
    else:
        print(json.dumps(asdict(run(options.row_bytes))))


if __name__ == "__main__":
    main()
