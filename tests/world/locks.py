"""What threads wait for: sleep, locks, conditions, events and queues in virtual time.

Each takes the place of the class of its name in ``threading`` or ``queue``. A thread runs until it
blocks, so a lock is contended only where its holder blocks.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from typing import Any

import greenlet

from tests.world.kernel import Waiter, kernel


def sleep(seconds: float) -> None:
    Waiter(kernel()).wait(seconds)


class Lock:
    def __init__(self) -> None:
        self._is_held = False
        self._waiters: deque[Waiter] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        while self._is_held:
            if not blocking:
                return False
            waiter = Waiter(kernel())
            self._waiters.append(waiter)
            if not waiter.wait(None if timeout < 0 else timeout):
                self._waiters.remove(waiter)  # so that a release wakes one that still waits
                return False
        self._is_held = True
        return True

    def release(self) -> None:
        self._is_held = False
        if self._waiters:
            self._waiters.popleft().wake()

    def locked(self) -> bool:
        return self._is_held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    def __init__(self) -> None:
        super().__init__()
        self._owner: object = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        current = greenlet.getcurrent()
        if self._owner is not current:
            if not super().acquire(blocking, timeout):
                return False
            self._owner = current
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            super().release()


class Condition:
    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = lock or RLock()
        self.acquire, self.release = self._lock.acquire, self._lock.release
        self._waiters: deque[Waiter] = deque()

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        waiter = Waiter(kernel())
        self._waiters.append(waiter)
        self._lock.release()
        try:
            is_woken = waiter.wait(timeout)
            if not is_woken:  # before the lock is free: its holder may notify meanwhile
                self._waiters.remove(waiter)
        finally:
            if not kernel().is_closed():
                self._lock.acquire()
        return is_woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        own = kernel()
        until_s = None if timeout is None else own.now_s + timeout
        while not (result := predicate()):
            left_s = None if until_s is None else until_s - own.now_s
            if (left_s is not None and left_s <= 0) or own.is_closed():
                return result
            self.wait(left_s)
        return result

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiters))):
            self._waiters.popleft().wake()

    def notify_all(self) -> None:
        self.notify(len(self._waiters))


class Event:
    def __init__(self) -> None:
        self._is_set = False
        self._changed = Condition(Lock())

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._changed.notify_all()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._is_set, timeout))


class SimpleQueue:
    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiters: deque[Waiter] = deque()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self._items.append(item)
        if self._waiters:
            self._waiters.popleft().wake()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        own = kernel()
        until_s = None if timeout is None else own.now_s + timeout
        while not self._items:
            left_s = None if until_s is None else until_s - own.now_s
            if not block or (left_s is not None and left_s <= 0):
                raise queue.Empty
            waiter = Waiter(own)
            self._waiters.append(waiter)
            if not waiter.wait(left_s) and waiter in self._waiters:
                self._waiters.remove(waiter)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class MainThread:
    """Takes the place of ``threading.main_thread()`` in the records of logs."""

    name = "main"
    daemon = False
    ident = 1


def current_thread() -> Any:
    """Return an object with the current thread's name."""
    return MainThread
