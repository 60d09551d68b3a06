"""The machine under a world: virtual time, processes, and threads.

All of a world runs on one thread of the real machine, one callback at a time, so a run is a
function of its seed. An event loop of virtual time runs the coroutines of all processes; it jumps
to the next timer where nothing is ready. A thread of the product is a greenlet: it runs until it
blocks, and a callback of the loop goes on with it. Each callback belongs to the process in whose
context it was scheduled; the callbacks of a process that has ended never run.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import random
import struct
import traceback
import zlib
from asyncio import events
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import greenlet

Callback = Callable[..., object]
Context = contextvars.Context | None
FIRST_PID = 1000
_STAMP = struct.Struct("<qd")


class BlockedLoopError(RuntimeError):
    """Code on an event loop called what blocks a thread."""


class ProcessExit(BaseException):
    """Ends the rest of a callback whose process has ended."""


@dataclass(eq=False, slots=True)
class Process:
    """A process of the world; ``node`` is the name of its host.

    ``monotonic_s`` is what its host's monotonic clock is ahead of the world's, ``wall_s`` what its
    wall clock is ahead of that. A process that ``is_paused`` lives and runs nothing.
    """

    name: str
    node: str
    pid: int
    monotonic_s: float = 0.0
    wall_s: float = 0.0
    is_alive: bool = True
    is_paused: bool = False
    begun_at_s: float = 0.0
    ended_at_s: float | None = None
    held: list[Due] = field(default_factory=list)
    """The callbacks that are due once the process goes on."""
    on_end: list[Callable[[], None]] = field(default_factory=list)
    """Called when the process ends."""


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Thread:
    """Takes the place of ``threading.Thread``; a greenlet of the process that starts it."""

    def __init__(
        self, group: None = None, target: Callback | None = None, name: str | None = None,
        args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *,
        daemon: bool | None = None,
    ) -> None:  # fmt: skip
        self.name = name or "thread"
        self.daemon = bool(daemon)
        self._target, self._args, self._kwargs = target, args, kwargs or {}
        self._kernel = kernel()
        self._ended: list[Waiter] = []
        self._is_alive = False
        self.ident = id(self)

    def start(self) -> None:
        self._is_alive = True
        self._kernel.spawn(self._run)

    def _run(self) -> None:
        try:
            if self._target is not None:
                self._target(*self._args, **self._kwargs)
        finally:
            self._is_alive = False
            for waiter in self._ended:
                waiter.wake()

    def join(self, timeout: float | None = None) -> None:
        if self._is_alive:
            waiter = Waiter(self._kernel)
            self._ended.append(waiter)
            waiter.wait(timeout)

    def is_alive(self) -> bool:
        return self._is_alive


class Waiter:
    """One wait of one thread, which :meth:`wake` ends."""

    __slots__ = ("_greenlet", "_kernel", "_process", "is_woken")

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._greenlet: greenlet.greenlet | None = None
        self._process: contextvars.Context | None = None
        self.is_woken = False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block the thread; returns whether it was woken in time."""
        if self.is_woken or (timeout_s is not None and timeout_s <= 0):
            return self.is_woken  # at once: the caller may hold a lock of the real machine
        current = greenlet.getcurrent()
        if current is self._kernel.hub:
            if self._kernel.is_closed():  # the world ends: nothing waits any more
                return False
            raise BlockedLoopError("the event loop's thread waits for another thread")
        self._greenlet, self._process = current, contextvars.copy_context()
        timer = None
        if timeout_s is not None:
            timer = self._kernel.call_later(timeout_s, self._resume)
        self._kernel.park()
        if timer is not None:
            timer.cancel()
        return self.is_woken

    def wake(self) -> None:
        if not self.is_woken:
            self.is_woken = True
            if self._greenlet is not None:
                self._kernel.call_soon(self._resume, context=self._process)

    def _resume(self) -> None:
        waiting, self._greenlet = self._greenlet, None
        if waiting is not None:
            self._kernel.resume(waiting)


class Due:
    """A callback that is to run; takes the place of ``asyncio.Handle`` and ``TimerHandle``.

    Most of a world's time goes by callbacks, and those of asyncio cost twice as much.
    """

    __slots__ = ("_when_s", "args", "callback", "context", "is_cancelled")

    def __init__(
        self, callback: Callback, args: tuple[Any, ...], context: Context, when_s: float = 0.0
    ) -> None:
        self.callback, self.args, self._when_s = callback, args, when_s
        self.context = contextvars.copy_context() if context is None else context
        self.is_cancelled = False

    def cancel(self) -> None:
        """Never run it; what it refers to is let go."""
        self.is_cancelled = True
        self.callback, self.args = _nothing, ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self._when_s


def _nothing() -> None:
    """Take the place of a callback that was cancelled."""


_EventLoop: Any = asyncio.AbstractEventLoop
"""``Any``, since a world has the methods that the product calls and no others."""


class Kernel(_EventLoop):
    """The event loop of all processes of one world."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.hub: greenlet.greenlet | None = None
        self.network: Any = None
        """The world's :class:`tests.world.network.Network`, by which its sockets go."""
        self.errors: list[str] = []
        """What coroutines and callbacks raised and nobody caught."""
        self.processes: list[Process] = []
        """All processes that there ever were."""
        self.on_life: Callable[[Process, str], None] = lambda process, what: None
        """Told of each process that begins or ends."""
        self.num_callbacks = 0
        self.digest = 0
        """A checksum of the time and process of all callbacks so far."""
        self._crashes: dict[Process, tuple[int, Callable[[Process], None]]] = {}
        self._ready: deque[Due] = deque()
        self._timers: list[tuple[float, int, Due]] = []
        self._numbers = itertools.count()
        self._pids = itertools.count(FIRST_PID)
        self._threads: dict[greenlet.greenlet, None] = {}
        """Those that have not ended."""
        self._tasks: dict[Any, Process | None] = {}
        self._is_closed = False

    # Processes.

    def process(self, name: str, node: str) -> Process:
        made = Process(name, node, next(self._pids), begun_at_s=self.now_s)
        self.processes.append(made)
        self.on_life(made, "begins")
        return made

    @contextmanager
    def within(self, process: Process | None) -> Iterator[None]:
        """Schedule callbacks as ``process`` inside."""
        token = PROCESS.set(process)
        try:
            yield
        finally:
            PROCESS.reset(token)

    def end(self, process: Process) -> None:
        """End a process at once: nothing of it runs any more, not even the rest of a callback."""
        if process.is_alive:
            process.is_alive = False
            process.ended_at_s = self.now_s
            self.on_life(process, "ends")
            process.held.clear()
            for call in process.on_end:
                call()
            process.on_end.clear()

    def pause(self, process: Process) -> None:
        process.is_paused = True

    def go_on(self, process: Process) -> None:
        process.is_paused = False
        if process.is_alive:
            self._ready.extend(process.held)
        process.held.clear()

    # Threads.

    def spawn(self, target: Callable[[], object]) -> None:
        """Run ``target`` on a thread of the current process, soon."""
        thread = greenlet.greenlet(lambda: self._guarded(target), self.hub)
        thread.gr_context = contextvars.copy_context()
        self._threads[thread] = None
        self.call_soon(self.resume, thread)

    def _guarded(self, target: Callable[[], object]) -> None:
        try:
            target()
        except (greenlet.GreenletExit, ProcessExit):
            pass
        except KeyboardInterrupt:  # of the real machine
            raise
        except BaseException as error:
            process = PROCESS.get()
            trace = "".join(traceback.format_exception(error)[-6:])
            self.note(f"a thread of {process.name if process else 'world'} raised:\n{trace}")
        finally:
            self._threads.pop(greenlet.getcurrent(), None)

    def park(self) -> None:
        """Block the current thread until :meth:`resume`."""
        if self._is_closed:
            raise greenlet.GreenletExit
        assert self.hub is not None
        self.hub.switch()

    def resume(self, thread: greenlet.greenlet) -> None:
        """Go on with a thread; called by the loop."""
        if not thread.dead:
            thread.switch()

    # The event loop.

    def run(self, until_s: float, is_done: Callable[[], bool] | None = None) -> None:
        """Run until a time of the world, or until ``is_done`` after a callback."""
        if self.hub is None:
            self.hub = greenlet.getcurrent()
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            while is_done is None or not is_done():
                due = self._next(until_s)
                if due is None:
                    break
                try:
                    due.context.run(due.callback, *due.args)
                except KeyboardInterrupt:  # of the real machine
                    raise
                except BaseException as error:
                    told = {"message": "a callback raised", "exception": error}
                    self.call_exception_handler(told)
        finally:
            events._set_running_loop(before)

    def _next(self, until_s: float) -> Due | None:
        """Return the next callback of a process that runs, if any is due by ``until_s``."""
        timers, ready = self._timers, self._ready
        while True:
            if ready:
                due = ready.popleft()
            else:
                if not timers or timers[0][0] > until_s:
                    self.now_s = max(self.now_s, until_s)
                    return None
                when_s, _, due = heapq.heappop(timers)
                if when_s > self.now_s:
                    self.now_s = when_s
            if due.is_cancelled:
                continue
            process = due.context.get(PROCESS)
            if process is None:
                pid = 0
            elif not process.is_alive:
                continue
            elif process.is_paused:
                process.held.append(due)
                continue
            elif self._crashes and self._is_crash(process):
                continue
            else:
                pid = process.pid
            self.num_callbacks += 1
            self.digest = zlib.crc32(_STAMP.pack(pid, self.now_s), self.digest)
            return due

    def crash_after(self, process: Process, number: int, end: Callable[[Process], None]) -> None:
        """End a process before the callback of this number from now on."""
        self._crashes[process] = number, end

    def _is_crash(self, process: Process) -> bool:
        if process not in self._crashes:
            return False
        number, end = self._crashes[process]
        if number:
            self._crashes[process] = number - 1, end
            return False
        del self._crashes[process]
        end(process)
        return True

    def note(self, error: str) -> None:
        if not self._is_closed:
            self.errors.append(error)

    def close(self) -> None:
        """End all threads and tasks; whatever they do then has no effect."""
        self._is_closed = True
        for thread in list(self._threads):
            thread.throw(greenlet.GreenletExit)
        self._threads.clear()
        for task in self._tasks:
            task._log_destroy_pending = False
        self._tasks.clear()
        self._ready.clear()
        self._timers.clear()

    def tasks_of(self, process: Process) -> list[str]:
        return sorted(
            task.get_coro().__qualname__  # type: ignore[union-attr]
            for task, owner in self._tasks.items()
            if owner is process
        )

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._is_closed

    def call_soon(self, callback: Callback, *args: Any, context: Context = None) -> Due:
        due = Due(callback, args, context)
        self._ready.append(due)
        return due

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callback, *args: Any, context: Context = None
    ) -> Due:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callback, *args: Any, context: Context = None) -> Due:
        due = Due(callback, args, context, when)
        heapq.heappush(self._timers, (when, next(self._numbers), due))
        return due

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> Any:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks[task] = PROCESS.get()  # so that those of ended processes are kept too
        task.add_done_callback(self._tasks.pop)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except greenlet.GreenletExit:
                raise
            except BaseException as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.spawn(run)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, (asyncio.CancelledError, ProcessExit)):
            trace = "".join(traceback.format_exception(error)[-8:]) if error else ""
            self.note(f"{context.get('message')}:\n{trace}")

    async def shutdown_asyncgens(self) -> None:
        return

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        return


_kernels: list[Kernel] = []


def kernel() -> Kernel:
    return _kernels[-1]


@contextmanager
def running(own: Kernel) -> Iterator[None]:
    """Make a kernel the one that threads, locks and sockets belong to."""
    _kernels.append(own)
    try:
        yield
    finally:
        _kernels.pop()


def current_process() -> Process | None:
    return PROCESS.get()
