"""Measures how long each actor takes for its part of a layer, beside the other actors.

A part of E experts and R rows takes ``slowness * (part_s + E * expert_s + R * row_s)``. The three
costs are those of all actors together: a product that reads an expert's weights costs time however
few rows it has. The slowness is an actor's own. Without the costs, an actor that is asked for less
would appear slow, since its few rows carry all of the constant part of the time.

Nothing here waits or sends; the clock is the caller's. All methods may be called from any thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

Actor = tuple[str, int]
"""An actor's id and generation."""
BATCH = 32
"""So many answers are taken into account together."""
COSTS_DECAY = 0.98
"""The share of earlier answers that still counts for the costs one batch later."""
WEIGHT = 0.05
"""The weight of an answer in its actor's slowness, beside earlier ones."""
RARE_WEIGHT, RARE_S = 0.3, 0.5
"""The weight of an answer that comes so long after its actor's last one: an actor that is seldom
asked would take long to recover otherwise."""
MIN_ANSWERS = 8
"""The answers of an actor before it is judged."""
MAX_TIMES = 16.0
"""The most that an answer counts, in multiples of the expected time: one pause says little."""
SLOW = 1.5
"""The multiple of the fastest actor's time from which an actor's own time decides whether it is
asked. Below it, actors count as equal, so that noise decides nothing."""
USUAL_WEIGHT = 0.1
"""The weight of a batch in the time of a usual part."""
MIN_S = 0.00025
"""Times of usual parts that differ by less count as equal: as long as the router itself takes to
send and to read."""
FRESH_S = 60.0
"""How long after its latest answer an actor's slowness is reported."""
_SWEEPS = 10
_TIE = 0.003
"""How much less the constant part of a time is preferred, where the answers leave it open: where
all parts are of about one size."""


class Costs(NamedTuple):
    """The seconds of a part, of each expert in it and of each row, on the fastest actor."""

    part_s: float
    expert_s: float
    row_s: float


class Judgement(NamedTuple):
    """The costs of parts, and how many times as long as the fastest actor each slow actor takes."""

    costs: Costs
    slowness: Mapping[str, float]

    def part_s(self, actor_id: str, experts: int, rows: float) -> float:
        """Return how long an actor takes for a part of so many experts and rows."""
        part_s, expert_s, row_s = self.costs
        time_s = part_s + experts * expert_s + rows * row_s
        return self.slowness.get(actor_id, 1.0) * time_s


@dataclass(slots=True)
class _Known:
    """The logarithm of an actor's slowness, a mean of ``answers``, the latest at ``at_s``."""

    log: float = 0.0
    answers: int = 0
    at_s: float = -math.inf


@dataclass(slots=True)
class _Batch:
    """Answers that are not taken into account yet."""

    actors: list[Actor] = field(default_factory=list)
    work: list[tuple[float, float, float, float]] = field(default_factory=list)
    """1, experts, rows and seconds of each."""


class AnswerTimes:
    """The costs of a model's parts, and the slowness of the actors that compute them."""

    def __init__(self) -> None:
        """Begin without any answer; no actor is slow yet."""
        self._lock = threading.Lock()
        self._batch = _Batch()
        self._products = np.zeros((3, 4))
        """Sums over earlier answers, relative to their expected times, of products of columns."""
        self._costs: np.ndarray | None = None
        self._usual_s = 0.0
        """How long the fastest actor takes for the mean part of the latest answers."""
        self._known: dict[Actor, _Known] = {}
        self._judgement: Judgement | None = None

    @property
    def judgement(self) -> Judgement | None:
        """The newest; ``None`` where no actor is slow."""
        return self._judgement

    def note(self, actor: Actor, experts: int, rows: float, took_s: float, now_s: float) -> None:
        """Record that an actor's part of so many ``experts`` and ``rows`` took ``took_s``.

        ``rows`` may be work in another unit. It includes the work that the actor had to do first.
        """
        with self._lock:
            self._batch.actors.append(actor)
            self._batch.work.append((1.0, experts, rows, took_s))
            if len(self._batch.actors) >= BATCH:
                self._learn(now_s)

    def forget_others(self, generations: Mapping[str, int]) -> None:
        """Drop the actors that are gone, and earlier generations."""
        with self._lock:
            self._known = {
                actor: known
                for actor, known in self._known.items()
                if generations.get(actor[0]) == actor[1]
            }
            self._judge()

    def slowness(self, now_s: float) -> dict[Actor, float]:
        """Return how many times as long as the fastest actor each takes that answered lately."""
        with self._lock:
            judged = self._judged()
            return {a: times for a, times in judged.items() if self._is_fresh(a, now_s)}

    def _is_fresh(self, actor: Actor, now_s: float) -> bool:
        return now_s - self._known[actor].at_s <= FRESH_S

    def _judged(self) -> dict[Actor, float]:
        logs = {a: k.log for a, k in self._known.items() if k.answers >= MIN_ANSWERS}
        least = min(logs.values(), default=0.0)
        judged = {actor: math.exp(log - least) for actor, log in logs.items()}
        least_times = 1.0 + MIN_S / self._usual_s if self._usual_s else math.inf
        return {actor: times if times >= least_times else 1.0 for actor, times in judged.items()}

    def _learn(self, now_s: float) -> None:
        """Take a batch into account, first for the actors' slowness, then for the costs."""
        batch, self._batch = self._batch, _Batch()
        work = np.array(batch.work)
        took_s = np.maximum(work[:, 3], 1e-6)
        if self._costs is None:
            expected_s = took_s
        else:
            expected_s = np.maximum(work[:, :3] @ self._costs, 1e-6)
            self._usual_s += USUAL_WEIGHT * (float(expected_s.mean()) - self._usual_s)
            logs = np.log(np.clip(took_s / expected_s, 1 / MAX_TIMES, MAX_TIMES))
            for actor, log in zip(batch.actors, logs.tolist(), strict=True):
                self._average(actor, log, now_s)
        # Slow actors are left out: only they have small parts, so that their slowness would be
        # taken for the constant part of the time.
        judged = self._judged()
        is_usual = [judged.get(actor, 1.0) < SLOW for actor in batch.actors]
        relative = (work / expected_s[:, None])[is_usual]
        self._products = COSTS_DECAY * self._products + relative[:, :3].T @ relative
        self._costs = _solved(self._products, self._costs)
        self._judge()

    def _average(self, actor: Actor, log: float, now_s: float) -> None:
        known = self._known.setdefault(actor, _Known())
        weight = RARE_WEIGHT if now_s - known.at_s >= RARE_S else WEIGHT
        known.answers += 1
        known.log += max(weight, 1 / known.answers) * (log - known.log)
        known.at_s = now_s

    def _judge(self) -> None:
        slow = {actor_id: times for (actor_id, _), times in self._judged().items() if times >= SLOW}
        self._judgement = None
        if slow and self._costs is not None:
            costs = Costs(*self._costs.tolist())
            self._judgement = Judgement(costs, MappingProxyType(slow))


def _solved(products: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    """Return the costs, none below 0, of least squares by coordinate descent.

    ``products`` [3, 4] are the normal equations, with the times in the last column.
    """
    matrix, times = products[:, :3].tolist(), products[:, 3].tolist()
    matrix[0][0] *= 1 + _TIE
    costs = [0.0, 0.0, 0.0] if start is None else start.tolist()
    for _ in range(_SWEEPS):
        for i, (row, time) in enumerate(zip(matrix, times, strict=True)):
            rest = time - sum(row[j] * costs[j] for j in range(3) if j != i)
            costs[i] = max(0.0, rest / row[i]) if row[i] > 0 else 0.0
    return np.array(costs)
