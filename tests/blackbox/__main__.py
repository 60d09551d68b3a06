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
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deploy
from benchmarks.common import show
from benchmarks.soak import swapped_experts
from tests.blackbox import asks, events
from tests.blackbox.answers import Answer
from tests.blackbox.clients import Clients
from tests.blackbox.judge import Names, judge
from tests.blackbox.machines import MACHINES, MODEL, Machines
from tests.blackbox.oracle import Oracle
from tests.fault.network import enter, why_not_permitted

THREADS, THINK_S, QUIET_S, TOLD_S = 6, (0.0, 0.8), (3.0, 8.0), 15.0


class History:
    """Writes what happens as lines of JSON, counts it, and tells of it; safe for threads."""

    def __init__(self, file: Path) -> None:
        self._output = file.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._began_s = self._told_s = time.monotonic()
        self.counts: Counter[tuple[str, str]] = Counter()

    def note(self, what: str, **details: Any) -> None:
        """Write one line."""
        with self._lock:
            now_s = time.monotonic()
            line = {"at_s": round(now_s - self._began_s, 3), "what": what, **details}
            self._output.write(json.dumps(line) + "\n")
            self._output.flush()
            if what == "request":
                self.counts["request", details["ask"]["kind"]] += 1
                self.counts["end", details["end"]] += 1
            elif what == "event":
                self.counts["event", details["kind"]] += 1
            elif what == "violation":
                self.counts["violation", details["of"]] += 1
            if what != "request" or now_s > self._told_s + TOLD_S:
                self._told_s = now_s
                self._tell(line)

    def total(self, of: str) -> int:
        """Return how many there were of a sort."""
        return sum(count for (sort, _), count in self.counts.items() if sort == of)

    def _tell(self, line: dict[str, Any]) -> None:
        told = f"{self.total('request')} answers, {self.total('violation')} violations"
        rest = {name: value for name, value in line.items() if name not in ("at_s", "ask", "came")}
        print(f"{line['at_s']:7.1f} s  {told}  {json.dumps(rest)[:300]}", flush=True)


class Load:
    """Clients that ask on until :meth:`end`; every answer is judged at once."""

    def __init__(
        self,
        seed: int,
        clients: Clients,
        oracles: dict[str, Oracle],
        faults: events.Faults,
        history: History,
    ) -> None:
        self._seed, self._clients, self._oracles = seed, clients, oracles
        self._faults, self._history = faults, history
        self._names, self._judging = Names(), threading.Lock()
        self._numbers, self._ended = itertools.count(), threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Wait for the last answers."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self) -> None:
        while not self._ended.is_set():
            ask = asks.draw(self._seed, next(self._numbers))
            try:
                self._judge(self._clients.send(ask))
            except Exception as error:  # of the checker, or an answer that cannot be read
                self._history.note("violation", of="checker", found=[repr(error)], ask=asdict(ask))
            self._ended.wait(random.Random(ask.number).uniform(*THINK_S))

    def _judge(self, answer: Answer) -> None:
        served, faults = self._faults.around(answer.began_s, answer.ended_s)
        with self._judging:
            found = judge(
                answer,
                lambda name: self._oracles[name].expected(answer.ask),
                served,
                self._names,
                faults,
            )
        end = answer.failures[-1].code if answer.has_failed else "answered"
        details = {
            "ask": asdict(answer.ask),
            "end": end,
            "took_s": round(answer.ended_s - answer.began_s, 3),
            "tokens": answer.num_tokens,
            "failures": [list(failure) for failure in answer.failures],
            "faults": [fault.what for fault in faults],
        }
        self._history.note("request", **details)
        if found:
            came = [asdict(choice) | {"identities": sorted(choice.identities)} for choice in answer.choices]
            self._history.note("violation", of="request", found=found, **details, came=came)


def run(minutes: float, seed: int, folder: Path, history: History) -> None:
    """Start the cluster, and do episodes until the time is over."""
    until_s = time.monotonic() + 60 * minutes
    with ExitStack() as stack:
        machines = Machines(folder)
        stack.callback(machines.stop)
        other = folder / "other"
        other.mkdir()
        own = Path(deploy.__file__).parent / "models" / MODEL
        weights = {"bundled": own, "swapped": swapped_experts(other)}
        oracles = {name: stack.enter_context(closing(Oracle(one))) for name, one in weights.items()}
        for oracle in oracles.values():
            oracle.agree(asks.prompts_of(seed))
        for machine in MACHINES:
            machines.start(machine)
        done = machines.deploy(own)
        if done.exit_code:
            raise RuntimeError(f"the deployment failed: {done.errors}")
        faults = events.Faults(machines, weights, history.note)
        faults.become_calm()
        load = Load(seed, Clients(machines), oracles, faults, history)
        stack.callback(load.end)
        bag: list[events.Kind] = []
        for number in itertools.count():
            quiet_s = random.Random(f"{seed}: quiet {number}").uniform(*QUIET_S)
            threading.Event().wait(quiet_s)
            if time.monotonic() > until_s:
                break
            episode = events.draw(seed, number, bag)
            history.note("episode", number=number, events=[asdict(event) for event in episode])
            faults.episode(episode)
            faults.become_calm()


def main(arguments: list[str]) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.blackbox", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--history", type=Path, default=Path("blackbox.jsonl"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.inside:
        if why := why_not_permitted():
            print(f"blackbox: this computer permits no namespaces: {why}", file=sys.stderr)
            return 2
        print(f"blackbox: seed {options.seed}, history in {options.history}", flush=True)
        given = ["--minutes", str(options.minutes), "--seed", str(options.seed)]
        enter("tests.blackbox", *given, "--history", str(options.history), "--inside")
    history = History(options.history)
    folder = Path(tempfile.mkdtemp(prefix="bb-"))  # short, for Ray's sockets
    try:
        run(options.minutes, options.seed, folder, history)
    except Exception as error:
        history.note("violation", of="run", found=[f"{type(error).__name__}: {error}"])
        print(f"blackbox: the machines' logs are in {folder}")
    else:
        shutil.rmtree(folder)
    rows = [(*name, count) for name, count in sorted(history.counts.items())]
    show(f"blackbox, {options.minutes:g} minutes, seed {options.seed}", rows, ["", "", "count|.0f"])
    return int(history.total("violation") > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
