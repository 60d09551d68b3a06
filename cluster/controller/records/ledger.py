"""The ledger: what must never go backwards, even when the controller and all actors die together.

Routers take only a newer placement, and an actor's name contains its generation. A new controller
learns both from the living actors or, if none survived, from this ledger. It is in Ray's
key-value store, which lives as long as the cluster's head.

The store can atomically create an absent key, but has no conditional replace. So
the ledger is a row of numbered records, of which the last one counts. A write creates the record
after its writer's last one, so of two writers one fails. The first write of an epoch claims it. The
controllers of earlier epochs do not know that record, and can no longer write.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from cluster.controller.records.fleet import PoolMembers
from cluster.errors import StaleEpochError
from cluster.ray_private import KeyValueStore
from cluster.spec import ModelExperts, app_part


@dataclass(frozen=True, slots=True)
class Ledger:
    """The last epoch of an application's controllers, and the last generation of each actor.

    ``pools`` has the members of each pool, which scaling changes. ``models`` are those that actors
    may hold experts of.
    """

    epoch: int = 0
    generations: dict[str, int] = field(default_factory=dict)
    pools: dict[str, PoolMembers] = field(default_factory=dict)
    models: tuple[ModelExperts, ...] = ()

    def to_json(self) -> str:
        """Return the ledger as text."""
        return _LEDGER.dump_json(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Ledger:
        """Rebuild a ledger from :meth:`to_json`."""
        return _LEDGER.validate_json(text)


_LEDGER = TypeAdapter(Ledger)


class LedgerStore:
    """The ledger of one application, as one controller reads and writes it.

    A controller calls :meth:`claim` first, and writes under the epoch of that claim.
    """

    def __init__(self, app: str, store: KeyValueStore) -> None:
        """``store`` is shared by all controllers of the application."""
        self._prefix = f"{app_part(app)}/ledger/"
        self._store = store
        self._writer = uuid.uuid4().hex
        self._number = 0
        """The number of the last record that this controller wrote."""

    def read(self) -> Ledger:
        """Return the ledger written last, or an empty one."""
        return self._last()[1]

    def claim(self, above: int = 0) -> Ledger:
        """Begin the next epoch, higher than ``above``; returns the ledger with it.

        Each of several controllers that claim at the same time gets an epoch of its own. The last
        claim counts.
        """
        while True:
            number, last = self._last()
            mine = replace(last, epoch=max(last.epoch, above) + 1)
            if self._append(number, mine):
                return mine

    def write(self, ledger: Ledger) -> None:
        """Replace the ledger; raises :class:`StaleEpochError` if another controller has."""
        if not self._number or not self._append(self._number, ledger):
            raise _stale()

    def check(self) -> None:
        """Raise :class:`StaleEpochError` if another controller has claimed an epoch."""
        newest = self._newest()
        if newest != self._number and not self._is_mine(newest):
            raise _stale()

    def clear(self) -> None:
        """Empty the ledger when its application ends; raises :class:`StaleEpochError` like a write.

        The epoch stays, so that a late controller can no longer write.
        """
        self.write(Ledger(self._last()[1].epoch))

    def _append(self, after: int, ledger: Ledger) -> bool:
        """Write the record that follows ``after``; returns whether it is the last one then.

        Earlier records are deleted. So a late writer may recreate a record that
        was there before; it then finds a later one.
        """
        data = json.dumps({"writer": self._writer, "ledger": ledger.to_json()}).encode()
        number = after + 1
        while not self._store.create(self._key(number), data):
            if not self._is_mine(number):
                return False
            number += 1  # the answer to an earlier call was lost
        numbers = self._numbers()
        if max(numbers, default=0) != number:
            self._store.delete(self._key(number))
            return False
        self._number = number
        for earlier in numbers:
            if earlier < number:
                self._store.delete(self._key(earlier))
        return True

    def _is_mine(self, number: int) -> bool:
        data = self._store.get(self._key(number))
        return data is not None and bool(json.loads(data)["writer"] == self._writer)

    def _last(self) -> tuple[int, Ledger]:
        """Return the number of the last record, and the ledger; 0 if there is none."""
        while newest := self._newest():
            data = self._store.get(self._key(newest))
            if data is not None:  # otherwise a later record has taken its place
                return newest, Ledger.from_json(json.loads(data)["ledger"])
        return 0, Ledger()

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        """Return the numbers of all records."""
        return [int(key.removeprefix(self._prefix)) for key in self._store.keys(self._prefix)]

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number}"


def _stale() -> StaleEpochError:
    return StaleEpochError("a newer controller has claimed the ledger", "epoch")
