"""The outstanding work at the actors of a router whose dispatchers run concurrently.

A mixture's router has several dispatchers, each on a thread of its own. Each sees here what the
others have sent, so that it asks the copies on less loaded actors. Experts of a mixture may be
unlike: a row of a support vector machine takes many times as long as one of a linear model.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

from router.moe.answer_times import AnswerTimes
from router.moe.permute import Part


class SharedLoad:
    """The work under way at each actor, by thread; each dispatcher has a thread of its own.

    ``times`` are the actors' times, as all threads measure them.
    """

    def __init__(self, row_costs: Sequence[int]) -> None:
        """``row_costs`` [E] is the cost of a row of each expert, in any unit."""
        self._row_costs = row_costs
        self._sent: dict[int, Mapping[str, int]] = {}
        self.times = AnswerTimes()

    def work(self, counts: Sequence[int]) -> list[int]:
        """Return the work of each expert's rows: ``counts`` [E] times their costs."""
        return [count * cost for count, cost in zip(counts, self._row_costs, strict=True)]

    def part_work(self, part: Part) -> int:
        """Return the work of a part's rows."""
        costs = self._row_costs
        return sum(costs[e] * count for e, count in zip(part.expert_ids, part.counts, strict=True))

    def sent(self, work: Mapping[str, int]) -> None:
        """Note the work of this thread's layer by actor, in place of its last layer's."""
        self._sent[threading.get_ident()] = work

    def received(self) -> None:
        """Note that this thread has no outstanding work at any actor."""
        self.sent({})

    def owed(self) -> Mapping[str, int]:
        """Return each actor's outstanding work for all threads."""
        owed: Counter[str] = Counter()
        for work in list(self._sent.values()):
            owed.update(work)
        return owed
