"""A load that steps up and down again, under a deployment that follows it, and what came of it.

Clients ask for a few tokens each about every so often, whatever the deployment can do, so that the
load is what they ask for and not what they get. Who holds which expert is looked at all the while,
and the emulated devices write down what they computed when (``benchmarks.devices``).
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import steered
from benchmarks.common import MODEL, percentile
from benchmarks.serve_clients import Ports, Timed

if TYPE_CHECKING:
    from benchmarks.devices import Product
    from cluster.reports import LoadStatus

PROMPT_TOKENS, ANSWER_TOKENS = 2, 12
PERIOD_S = 3.0
"""So often each client asks, on average: four tokens a second."""
LOOK_S = 0.25
TIMEOUT_S = 60.0

Copy = tuple[str, int, int]
"""An actor, a layer and one of its experts."""


class Clients:
    """Clients that come and leave; every answer's tokens are compared with what must come."""

    def __init__(self, ports: Ports, seed: int) -> None:
        """Begin without any; the same seed has the same pauses."""
        from router.client import Client

        self.answers: list[Timed] = []
        self.failures: list[str] = []
        self._client = Client(ports.grpc_address, retry=None)
        self._seed = seed
        self._running: list[tuple[threading.Thread, threading.Event]] = []

    def come(self, experts: Sequence[int], over_s: float = 0.0) -> None:
        """Start a client for each of these experts of the first layer, one after the other."""
        for expert in experts:
            time.sleep(over_s / len(experts))
            number, leaving = len(self._running), threading.Event()
            source = random.Random(f"{self._seed} {number}")
            arguments = (steered.own_token(expert), source, leaving)
            thread = threading.Thread(target=self._ask_again, args=arguments)
            self._running.append((thread, leaving))
            thread.start()

    def leave(self, number: int) -> None:
        """Have those that came last ask no more; returns when their answers are whole."""
        going, self._running = self._running[-number:], self._running[:-number]
        for _, leaving in going:
            leaving.set()
        for thread, _ in going:
            thread.join()

    def close(self) -> None:
        """Have all leave."""
        if self._running:
            self.leave(len(self._running))
        self._client.close()

    def _ask_again(self, token: int, source: random.Random, leaving: threading.Event) -> None:
        due_s = time.perf_counter()
        while not leaving.is_set():
            try:
                self.answers.append(self._ask(token))
            except Exception as error:  # whatever it is, it is counted
                self.failures.append(f"{type(error).__name__}: {error}")
            # One that is late asks again at once, and no more often for that later.
            due_s = max(due_s + PERIOD_S * source.uniform(0.5, 1.5), time.perf_counter())
            leaving.wait(due_s - time.perf_counter())

    def _ask(self, token: int) -> Timed:
        from router.client import Sampling

        sampling = Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        timed = Timed()
        said: list[int] = []
        prompt = [token] * PROMPT_TOKENS
        for piece in self._client.stream(prompt, sampling, model=MODEL, timeout_s=TIMEOUT_S):
            timed.piece(len(piece.token_ids))
            said += piece.token_ids
        if said != expected(token, ANSWER_TOKENS):
            raise RuntimeError(f"said {said} after {token}: not steered")
        return timed.end()


def expected(token: int, number: int) -> list[int]:
    """Return the tokens that must come after this one."""
    said = []
    for _ in range(number):
        token = steered.next_token(token)
        said.append(token)
    return said


@dataclass(frozen=True, slots=True)
class Look:
    """Who held copies at a time (``time.perf_counter``); actors without any are ``empty``."""

    at_s: float
    copies: frozenset[Copy]
    empty: int

    @property
    def actors(self) -> frozenset[str]:
        """The actors that hold any."""
        return frozenset(actor_id for actor_id, _, _ in self.copies)


def look_of(told: LoadStatus, at_s: float) -> Look:
    """Return what the deployment's own answer says of copies."""
    copies = frozenset(
        (actor_id, one.layer, one.expert) for one in told.experts for actor_id in one.actors
    )
    holding = {actor_id for actor_id, _, _ in copies}
    return Look(at_s, copies, len({one.actor_id for one in told.devices} - holding))


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

    def wait_few(self, actors: int, copies: int, timeout_s: float) -> bool:
        """Wait until there are no more actors with copies, nor copies; tells whether in time."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            last = self.seen[-1]
            if len(last.actors) <= actors and len(last.copies) <= copies:
                return True
            time.sleep(LOOK_S)
        return False


@dataclass(frozen=True, slots=True)
class Plan:
    """How the load goes: clients and their expert before and in the step, and for how long."""

    base: int
    crowd: int
    base_s: float
    crowd_s: float
    after_s: float
    leave_timeout_s: float


BASE_EXPERT, CROWD_EXPERT = 0, 1


def run_step(ports: Ports, plan: Plan, fewest: int, seed: int) -> dict[str, Any]:
    """Have a crowd come and leave; returns what the figures are made of."""
    from benchmarks.devices import recorded

    clients, looks = Clients(ports, seed), Looks(ports)
    try:
        with looks.running():
            begin_s = time.perf_counter()
            clients.come([BASE_EXPERT] * plan.base, PERIOD_S)
            time.sleep(plan.base_s)
            before, come_s = looks.seen[-1], time.perf_counter()
            clients.come([CROWD_EXPERT] * plan.crowd)
            time.sleep(plan.crowd_s)
            products = recorded(MODEL)
            leave_s = time.perf_counter()
            clients.leave(plan.crowd)
            left_s = time.perf_counter()
            looks.wait_few(fewest, len(before.copies), plan.leave_timeout_s)
            time.sleep(plan.after_s)
            end_s = time.perf_counter()
    finally:
        clients.close()
    seen = looks.seen
    return {
        "clients": plan.base + plan.crowd,
        "answers": len(clients.answers),
        "failures": clients.failures,
        "served_s": served_after(products, before, come_s),
        "actors": {
            "before": len(before.actors),
            "most": max(len(look.actors) for look in seen),
            "after": len(seen[-1].actors),
        },
        "copies": {
            "before": len(before.copies),
            "most": max(len(look.copies) for look in seen),
            "after": len(seen[-1].copies),
        },
        "gone_s": {
            "actors": gone_after([(one.at_s, len(one.actors)) for one in seen], fewest, left_s),
            "copies": gone_after(
                [(one.at_s, len(one.copies)) for one in seen], len(before.copies), left_s
            ),
        },
        "last_answers_s": left_s - leave_s,
        "phases": {
            "before": between_ms(clients.answers, begin_s, come_s),
            "crowd, first 10 s": between_ms(clients.answers, come_s, come_s + 10),
            "crowd, last 10 s": between_ms(clients.answers, leave_s - 10, leave_s),
            "after": between_ms(clients.answers, end_s - plan.after_s, end_s),
        },
    }


def served_after(
    products: Mapping[str, Sequence[Product]], before: Look, come_s: float
) -> dict[str, float | None]:
    """Return after how long a copy that was not there ``before`` computed for the first time.

    On an actor that held others already (``standing``), and on one that held nothing (``new``);
    ``None`` where none did.
    """
    first: dict[str, float | None] = {"standing": None, "new": None}
    for actor_id, some in products.items():
        kind = "standing" if actor_id in before.actors else "new"
        for one in some:
            if one.start_s < come_s or (actor_id, one.layer_id, one.expert_id) in before.copies:
                continue
            known = first[kind]
            if known is None or one.start_s - come_s < known:
                first[kind] = one.start_s - come_s
    return first


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


def gaps_s(answers: Iterable[Timed], start_s: float, end_s: float) -> list[float]:
    """Return the times between tokens that ended within a time."""
    return [
        (later_s - sooner_s) / tokens
        for timed in answers
        for (sooner_s, _), (later_s, tokens) in zip(timed.pieces, timed.pieces[1:], strict=False)
        if start_s <= later_s < end_s
        for _ in range(tokens)
    ]


def between_ms(answers: Iterable[Timed], start_s: float, end_s: float) -> dict[str, float | None]:
    """Return p50 and p99 of the times between tokens, ``None`` where no token came."""
    gaps = gaps_s(answers, start_s, end_s)
    return {
        "p50_ms": 1e3 * statistics.median(gaps) if gaps else None,
        "p99_ms": 1e3 * percentile(gaps, 0.99) if gaps else None,
    }
