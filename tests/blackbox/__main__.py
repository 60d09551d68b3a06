"""Checks a real deployment on three machines from outside, with a drawn history of faults.

    python -m tests.blackbox [--minutes 60] [--seed N] [--history FILE]

The machines are network namespaces of this computer. Clients ask over HTTP and gRPC all the time,
while processes are killed and frozen, links cut, weights redeployed, actors scaled, copied and
drained. Every answer is compared with what one process computes; a failure is a violation unless
the documents say that a fault at that time touches that request. The history has a line of JSON for
each request, event and violation. The exit status is 1 after a violation, and 2 if this computer
permits no namespaces.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deploy
from benchmarks.common import show
from benchmarks.soak import swapped_experts
from tests.blackbox import asks, events
from tests.blackbox.clients import Clients
from tests.blackbox.judge import Judge
from tests.blackbox.machines import MACHINES, MODEL, Machines
from tests.blackbox.oracle import Oracle
from tests.fault.network import enter, why_not_permitted

THREADS, THINK_S, QUIET_S, TOLD_S = 6, (0.0, 0.8), 5.0, 15.0


class History:
    """Writes what happens as lines of JSON, counts it, and tells of it; safe for threads."""

    def __init__(self, file: Path) -> None:
        self._output, self._lock = file.open("w", encoding="utf-8"), threading.Lock()
        self._began_s, self._told_s = time.monotonic(), 0.0
        self.counts, self.violations = Counter[tuple[str, str]](), 0

    def note(self, what: str, kind: str, **details: Any) -> None:
        """Write one line; requests are told now and then, and all else at once."""
        with self._lock:
            at_s = round(time.monotonic() - self._began_s, 3)
            line = json.dumps({"at_s": at_s, "what": what, "kind": kind, **details})
            self._output.write(f"{line}\n")
            self._output.flush()
            self.counts[what, kind] += 1
            self.violations += what == "violation"
            if what != "request" or at_s > self._told_s + TOLD_S:
                self._told_s = at_s
                answers = sum(count for (one, _), count in self.counts.items() if one == "request")
                print(f"{answers} answers, {self.violations} violations: {line[:300]}", flush=True)


class Check:
    """A cluster, the clients that ask it, and the faults that befall it."""

    def __init__(self, seed: int, folder: Path, history: History, stack: ExitStack) -> None:
        """Start the cluster; ``stack`` ends it."""
        self._seed, self._history = seed, history
        own, other = Path(deploy.__file__).parent / "models" / MODEL, folder / "other"
        other.mkdir()
        weights, prompts = {"own": own, "swapped": swapped_experts(other)}, asks.prompts_of(seed)
        oracles = {name: Oracle(one, prompts) for name, one in weights.items()}
        machines = Machines(folder)
        stack.callback(machines.rays.stop)
        for machine in MACHINES:
            machines.start(machine)
        machines.deploy(own).check_returncode()
        self._clients, self._numbers = Clients(machines), itertools.count()
        self._faults = events.Faults(machines, weights, history.note)
        self._judge = Judge(lambda name, answer: oracles[name].expected(answer.ask))
        self._judging, self._ended = threading.Lock(), threading.Event()

    def run(self, until_s: float) -> None:
        """Do one episode after another while clients ask."""
        self._faults.become_calm()
        clients = [threading.Thread(target=self._ask_on) for _ in range(THREADS)]
        for client in clients:
            client.start()
        bag, number = list[str](), 0
        try:
            while time.monotonic() < until_s:
                episode = events.draw(self._seed, number, bag)
                number += 1
                self._history.note("episode", "", events=[asdict(event) for event in episode])
                self._faults.episode(episode)
                self._faults.become_calm()
                threading.Event().wait(QUIET_S)
        finally:
            self._ended.set()
            for client in clients:
                client.join()

    def _ask_on(self) -> None:
        while not self._ended.is_set():
            ask = asks.draw(self._seed, next(self._numbers))
            try:
                self._check(ask)
            except Exception as error:  # an answer that cannot be read
                self._history.note("violation", "answer", found=[repr(error)], ask=asdict(ask))
            self._ended.wait(random.Random(ask.number).uniform(*THINK_S))

    def _check(self, ask: asks.Ask) -> None:
        answer = self._clients.send(ask)
        served, faults = self._faults.around(answer.began_s, answer.ended_s)
        with self._judging:
            found = self._judge.violations(answer, served, faults)
        told = asdict(answer) | {"faults": [fault.what for fault in faults]}
        del told["choices"]
        self._history.note("request", ask.kind, tokens=answer.num_tokens, **told)
        if found:
            self._history.note("violation", "request", found=found, answer=asdict(answer))


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.blackbox", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--history", type=Path, default=Path("blackbox.jsonl"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if why := why_not_permitted():
            print(f"blackbox: this computer permits no namespaces: {why}", file=sys.stderr)
            return 2
        print(f"blackbox: seed {options.seed}, history in {options.history}", flush=True)
        enter("tests.blackbox", *sys.argv[1:], "--seed", str(options.seed), "--inside")
    history, until_s = History(options.history), time.monotonic() + 60 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="bb-"))  # short, for Ray's sockets
    try:
        with ExitStack() as stack:
            Check(options.seed, folder, history, stack).run(until_s)
    except Exception as error:  # the table comes all the same
        history.note("violation", "run", found=[f"{type(error).__name__}: {error}"])
    if history.violations:
        print(f"blackbox: the machines' logs are in {folder}")
    else:
        shutil.rmtree(folder)
    rows = [(*name, count) for name, count in sorted(history.counts.items())]
    show(f"blackbox, {options.minutes:g} minutes, seed {options.seed}", rows, ["", "", "count|.0f"])
    return int(history.violations > 0)


if __name__ == "__main__":
    sys.exit(main())
