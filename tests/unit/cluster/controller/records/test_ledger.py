"""The ledger: of several controllers one writes, and none that is older than the last claim."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from cluster.controller.records.ledger import Ledger, LedgerStore
from cluster.errors import StaleEpochError
from cluster.ray_private import MemoryStore


def test_a_claim_begins_the_next_epoch_and_keeps_the_rest() -> None:
    store = MemoryStore()
    first = LedgerStore("app", store)
    assert first.read() == Ledger()
    assert first.claim() == Ledger(1)
    first.write(Ledger(1, {"expert-0": 4}))
    assert LedgerStore("app", store).claim() == Ledger(2, {"expert-0": 4})
    assert LedgerStore("app", store).claim(above=40) == Ledger(41, {"expert-0": 4})
    assert LedgerStore("ap", store).read() == LedgerStore("app/ledger", store).read() == Ledger()


def test_an_older_controller_never_writes_again() -> None:
    store = MemoryStore()
    older, newer = LedgerStore("app", store), LedgerStore("app", store)
    older.claim()
    older.check()
    newer.claim()
    for attempt in (older.check, lambda: older.write(Ledger(1)), older.clear):
        with pytest.raises(StaleEpochError):
            attempt()
    for number in range(1, 6):  # records that the older one might take for its own to come
        newer.write(Ledger(2, {"expert-0": number}))
        with pytest.raises(StaleEpochError):
            older.write(Ledger(1))
    newer.check()
    assert newer.read() == Ledger(2, {"expert-0": 5})
    newer.clear()
    with pytest.raises(StaleEpochError):
        older.write(Ledger(1))
    assert LedgerStore("app", store).claim() == Ledger(3)


def test_a_controller_without_a_claim_does_not_write() -> None:
    with pytest.raises(StaleEpochError):
        LedgerStore("app", MemoryStore()).write(Ledger(1))


def test_old_records_do_not_pile_up() -> None:
    store = MemoryStore()
    for _ in range(3):
        ledger = LedgerStore("app", store)
        held = ledger.claim()
        for generation in range(5):
            ledger.write(replace(held, generations={"expert-0": generation}))
    assert len(store.values) == 1


def test_controllers_that_start_together_never_share_an_epoch() -> None:
    store = MemoryStore()
    epochs: list[int] = []
    start = threading.Barrier(8)

    def claim() -> None:
        start.wait(5)
        for _ in range(20):
            epochs.append(LedgerStore("app", store).claim().epoch)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(epochs) == list(range(1, 161))


class LateStore(MemoryStore):
    """Lets other controllers write between a controller's look at the store and its write."""

    def __init__(self, base: MemoryStore, meanwhile: list[LedgerStore]) -> None:
        self.values, self._meanwhile = base.values, meanwhile

    def create(self, key: str, value: bytes) -> bool:
        while self._meanwhile:
            other = self._meanwhile.pop()
            for generation in range(4):
                other.write(replace(other.read(), generations={"expert-0": generation}))
        return super().create(key, value)


def test_a_claim_that_was_overtaken_by_writes_claims_after_them() -> None:
    """The record that it creates first was there before, and was deleted meanwhile."""
    base = MemoryStore()
    writer = LedgerStore("app", base)
    writer.claim()
    late = LedgerStore("app", LateStore(base, [writer]))
    assert late.claim() == Ledger(2, {"expert-0": 3})
    late.check()
    with pytest.raises(StaleEpochError):
        writer.check()


def test_a_write_that_was_overtaken_by_a_claim_and_writes_fails() -> None:
    base = MemoryStore()
    newer = LedgerStore("app", base)
    older = LedgerStore("app", LateStore(base, []))
    older.claim()
    newer.claim()
    older._store = LateStore(base, [newer])
    with pytest.raises(StaleEpochError):
        older.write(Ledger(1))
    assert newer.read() == Ledger(2, {"expert-0": 3})
    newer.check()


class LossyStore(MemoryStore):
    """Loses answers: the store has done it, and the caller has an error or asks once more."""

    error: Exception | None = None
    is_repeated = False

    def create(self, key: str, value: bytes) -> bool:
        is_new = super().create(key, value)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.is_repeated:
            self.is_repeated = False
            return super().create(key, value)
        return is_new


def test_a_lost_answer_makes_no_controller_stale() -> None:
    store = LossyStore()
    ledger = LedgerStore("app", store)
    held = ledger.claim()
    store.error = ConnectionError("lost")
    with pytest.raises(ConnectionError):
        ledger.write(held)
    ledger.check()
    ledger.write(replace(held, generations={"expert-0": 7}))
    assert ledger.read().generations == {"expert-0": 7}
    store.is_repeated = True
    ledger.write(replace(held, generations={"expert-0": 8}))
    ledger.check()
    assert ledger.read().generations == {"expert-0": 8}
    with pytest.raises(StaleEpochError):
        LedgerStore("app", store).write(held)
