"""A peer's own process: reads a task as JSON, measures the peer, and writes a reply as JSON.

    PYTHON -m benchmarks.peers.ADAPTER TASK.json REPLY.json

Runs with a peer's Python, which has that peer and the standard library, so an adapter imports
nothing else. Files carry task and reply, because a peer may print anything.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

Tokens = list[list[int]]
"""A list of token ids for each sequence."""


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement of one peer in one number format.

    ``model`` is a checkpoint's folder or a GGUF file. ``prompts`` has a prompt for each of the most
    streams; ``long_prompts`` are prefilled one at a time. ``context`` is the most tokens that all
    sequences of a batch have together. ``device`` is ``cpu``, or for transformers ``accelerator``.
    """

    model: str
    format: str
    threads: int
    prompts: Tokens
    streams: tuple[int, ...]
    tokens: int
    rounds: int
    long_prompts: Tokens
    context: int
    device: str = "cpu"

    def to_json(self) -> str:
        """Return the task as :func:`read_task` reads it."""
        return json.dumps(asdict(self))


def read_task(text: str) -> Task:
    """Return a task; raises ``TypeError`` where it has other fields."""
    fields = json.loads(text)
    return Task(**{**fields, "streams": tuple(fields["streams"])})


class Loaded(Protocol):
    """A peer with its model in memory."""

    version: str

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Tokens:
        """Return ``tokens`` greedy tokens for each prompt, all prompts decoded as one batch."""


Load = Callable[[Task], Loaded]


def measure(task: Task, peer: Loaded) -> dict[str, Any]:
    """Return the reply to a task.

    ``streams`` has, by number of streams, each round's tokens per second, prefill included, and the
    last round's tokens. ``prefill_s`` has, by length, each round's seconds to the first new token.
    A first, short round of each does not count.
    """
    streams = {}
    for count in task.streams:
        times_s, tokens = _rounds(peer, task, task.prompts[:count], task.tokens)
        rates = [count * task.tokens / time_s for time_s in times_s]
        streams[str(count)] = {"rates": rates, "tokens": tokens}
    prefill_s = {str(len(ids)): _rounds(peer, task, [ids], 1)[0] for ids in task.long_prompts}
    return {
        "version": peer.version,
        "threads": task.threads,
        "streams": streams,
        "prefill_s": prefill_s,
    }


def _rounds(
    peer: Loaded, task: Task, prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[list[float], Tokens]:
    """Return the seconds of each round after a short one, and the last one's tokens."""
    generated = peer.generate(prompts, min(2, tokens))
    times_s = []
    for _ in range(task.rounds):
        began_s = time.perf_counter()
        generated = peer.generate(prompts, tokens)
        times_s.append(time.perf_counter() - began_s)
    return times_s, generated


def main(load: Load) -> None:
    """Answer the task that the command line names."""
    task_file, reply_file = map(Path, sys.argv[1:])
    task = read_task(task_file.read_text(encoding="utf-8"))
    reply = measure(task, load(task))
    reply_file.write_text(json.dumps(reply), encoding="utf-8")
