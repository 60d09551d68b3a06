"""Clients that ask a steered model, a load of them that steps up and down, and what came of it.

Who holds which expert is looked at all the while, and the emulated devices write down what they
computed when (``benchmarks.devices``).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import steered
from benchmarks.common import MODEL
from benchmarks.serve_clients import Ports, Timed

if TYPE_CHECKING:
    from benchmarks.devices import Product
    from cluster.reports import LoadStatus

ANSWER_TOKENS, PERIOD_S = 12, 3.0
"""Of each client of the load that steps: four tokens a second, on average."""
LOOK_S = 0.25
TIMEOUT_S = 600.0

Copy = tuple[str, int, int]
"""An actor, a layer and one of its experts."""


class Clients:
    """Clients that come and leave; every token is compared with the one that must come."""

    def __init__(self, ports: Ports, tokens: int, period_s: float = 0.0, seed: int = 0) -> None:
        """Begin without any.

        Each will ask for so many tokens, every ``period_s`` on average, whatever the deployment can
        do. The same seed has the same pauses.
        """
        from router.client import Client

        self.answers: list[Timed] = []
        self.failures: list[str] = []
        self._client = Client(ports.grpc_address, retry=None)
        self._tokens, self._period_s, self._seed = tokens, period_s, seed
        self._running: list[tuple[threading.Thread, threading.Event]] = []

    def come(self, tokens: Sequence[int], over_s: float = 0.0) -> None:
        """Start a client for each of these first tokens, one after the other."""
        for token in tokens:
            time.sleep(over_s / len(tokens))
            source, leaving = random.Random(f"{self._seed} {len(self._running)}"), threading.Event()
            thread = threading.Thread(target=self._ask_again, args=(token, source, leaving))
            self._running.append((thread, leaving))
            thread.start()

    def leave(self, number: int) -> None:
        """Have those that came last ask no more; returns when they have gone."""
        going = [self._running.pop() for _ in range(number)]
        for _, leaving in going:
            leaving.set()
        for thread, _ in going:
            thread.join()

    def close(self) -> None:
        """Have all leave."""
        self.leave(len(self._running))
        self._client.close()

    def _ask_again(self, token: int, source: random.Random, leaving: threading.Event) -> None:
        due_s = time.perf_counter()
        while not leaving.is_set():
            try:
                self._ask(token, leaving)
            except Exception as error:  # whatever it is, it is counted
                self.failures.append(f"{type(error).__name__}: {error}")
            # One that is late asks again at once, and no more often for that later.
            due_s = max(due_s + self._period_s * source.uniform(0.5, 1.5), time.perf_counter())
            leaving.wait(due_s - time.perf_counter())

    def _ask(self, token: int, leaving: threading.Event) -> None:
        """Ask for one answer, and leave it at the next token when the client leaves."""
        from router.client import Sampling

        sampling = Sampling(max_tokens=self._tokens, temperature=0.0, ignore_eos=True)
        timed, must_come = Timed(), iter(expected(token, self._tokens))
        self.answers.append(timed)
        pieces = self._client.stream([token], sampling, model=MODEL, timeout_s=TIMEOUT_S)
        for piece in pieces:
            if piece.exact:
                raise RuntimeError("an answer of emulated experts says that it is exact")
            for one in piece.token_ids:
                if one != (token := next(must_come)):
                    raise RuntimeError(f"{one} came, not {token}: not steered")
            timed.piece(len(piece.token_ids))
            if leaving.is_set():
                pieces.close()
                return
        if timed.tokens < self._tokens:
            raise RuntimeError(f"{timed.tokens} tokens came, not {self._tokens}")


def expected(token: int, number: int) -> list[int]:
    """Return the tokens that must come after this one."""
    return [token := steered.next_token(token) for _ in range(number)]


@dataclass(frozen=True, slots=True)
class Look:
    """Who held copies at a time (``time.perf_counter``)."""

    at_s: float
    copies: frozenset[Copy]

    @property
    def actors(self) -> frozenset[str]:
        """The actors that hold any."""
        return frozenset(actor_id for actor_id, _, _ in self.copies)

    @property
    def numbers(self) -> dict[str, int]:
        """How many actors and copies there were."""
        return {"actors": len(self.actors), "copies": len(self.copies)}


def look_of(told: LoadStatus, at_s: float) -> Look:
    """Return what the deployment's own answer says of copies."""
    return Look(
        at_s,
        frozenset(
            (actor_id, one.layer, one.expert) for one in told.experts for actor_id in one.actors
        ),
    )


class Looks:
    """Looks at the deployment again and again while a block runs."""

    def __init__(self, ports: Ports) -> None:
        """See :meth:`running`."""
        self._ports = ports
        self._ended = threading.Event()
        self.seen: list[Look] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look while the block runs."""
        thread = threading.Thread(target=self._look_again)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _look_again(self) -> None:
        from router.client import Client

        with Client(self._ports.grpc_address) as client:
            while not self._ended.wait(LOOK_S):
                self.seen.append(look_of(client.load(), time.perf_counter()))

    def wait_few(self, most: Mapping[str, int], timeout_s: float) -> None:
        """Wait until there are no more actors with copies, nor copies, or the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if all(self.seen[-1].numbers[what] <= number for what, number in most.items()):
                return
            time.sleep(LOOK_S)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the load goes: clients before and in the step, and for how long."""

    base_s: float
    crowd_s: float
    after_s: float
    base: int = 4
    crowd: int = 12
    leave_timeout_s: float = 60.0


BASE_EXPERT, CROWD_EXPERT = 0, 1


def run_step(ports: Ports, plan: Plan, fewest: int, seed: int) -> dict[str, Any]:
    """Have a crowd come and leave; returns what the figures are made of."""
    from benchmarks.devices import recorded

    clients, looks = Clients(ports, ANSWER_TOKENS, PERIOD_S, seed), Looks(ports)
    try:
        with looks.running():
            clients.come([steered.own_token(BASE_EXPERT)] * plan.base, PERIOD_S)
            time.sleep(plan.base_s)
            before, come_s = looks.seen[-1], time.perf_counter()
            clients.come([steered.own_token(CROWD_EXPERT)] * plan.crowd)
            time.sleep(plan.crowd_s)
            products = recorded(MODEL)
            clients.leave(plan.crowd)
            left_s = time.perf_counter()
            most = {"actors": fewest, "copies": len(before.copies)}
            looks.wait_few(most, plan.leave_timeout_s)
            time.sleep(plan.after_s)
    finally:
        clients.close()
    seen = looks.seen
    return {
        "answers": len(clients.answers),
        "failures": clients.failures,
        "served_s": served_after(products, before, come_s),
        "numbers": {
            what: {
                "before": before.numbers[what],
                "most": max(look.numbers[what] for look in seen),
                "after": seen[-1].numbers[what],
            }
            for what in most
        },
        "gone_s": {
            what: gone_after([(one.at_s, one.numbers[what]) for one in seen], number, left_s)
            for what, number in most.items()
        },
    }


def served_after(
    products: Mapping[str, Sequence[Product]], before: Look, come_s: float
) -> dict[str, float | None]:
    """Return after how long a copy that was not there ``before`` computed for the first time.

    On an actor that held others already (``standing``), and on one that held nothing (``new``);
    ``None`` where none did.
    """
    after_s: dict[str, list[float]] = {"standing": [], "new": []}
    for actor_id, some in products.items():
        kind = "standing" if actor_id in before.actors else "new"
        after_s[kind] += [
            one.start_s - come_s
            for one in some
            if one.start_s >= come_s
            and (actor_id, one.layer_id, one.expert_id) not in before.copies
        ]
    return {kind: min(times_s, default=None) for kind, times_s in after_s.items()}


def gone_after(seen: Iterable[tuple[float, int]], fewest: int, leave_s: float) -> float | None:
    """Return after how long there were at most ``fewest``, of the numbers seen at times, for good.

    That is the time of the first look that saw it; ``None`` where there were more at the end.
    """
    gone_s = None
    for at_s, number in seen:
        if at_s < leave_s or number > fewest:
            gone_s = None
        elif gone_s is None:
            gone_s = at_s - leave_s
    return gone_s
