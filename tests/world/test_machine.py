"""The machine under a world: time, threads, what they wait for, sockets and the network."""

from __future__ import annotations

import asyncio
import queue
import selectors
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.world.kernel import Process, Thread, running
from tests.world.locks import Condition, Event, Lock, RLock, SimpleQueue, sleep
from tests.world.network import TCP_TIMEOUT_S, WINDOW_BYTES, Network
from tests.world.sockets import Selector, Socket, create_connection, wait
from tests.world.streams import StreamLoop

LONG_S = 1000.0
Said = list[tuple[float, object]]


class Machine:
    """Two hosts, with a process on each; ``said`` is what threads have said, and when."""

    def __init__(self) -> None:
        self.kernel = StreamLoop(0)
        self.network = self.kernel.network = Network(self.kernel, ["a", "b"])
        self.a = self.kernel.process("a", "a")
        self.b = self.kernel.process("b", "b")
        self.said: Said = []

    def thread(self, target: Callable[[], object], process: Process | None = None) -> None:
        with self.kernel.within(process or self.a):
            self.kernel.spawn(target)

    def say(self, what: object) -> None:
        self.said.append((round(self.kernel.now_s, 6), what))

    def then(self, *steps: Callable[[], object] | float) -> Callable[[], None]:
        """Return a thread that sleeps for the numbers, and says what the calls return."""

        def run() -> None:
            for step in steps:
                if callable(step):
                    self.say(step())
                else:
                    sleep(step)

        return run

    def run(self, until_s: float = LONG_S) -> Said:
        """Let time pass; returns what was said. Nothing may have been raised unseen."""
        self.kernel.run(until_s)
        assert self.kernel.errors == []
        return self.said


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    with running(made.kernel):
        yield made
        made.kernel.close()


# Time and threads.


def test_a_sleep_takes_as_long_as_it_says_and_no_other_thread_waits(machine: Machine) -> None:
    def parent() -> None:
        thread = Thread(target=machine.then(2.0, lambda: "child"))
        thread.start()
        thread.join(1.0)
        machine.say(thread.is_alive())
        thread.join()
        machine.say(thread.is_alive())

    machine.thread(machine.then(1.5, lambda: "late", 0.0, lambda: "at once"))
    machine.thread(parent)
    assert machine.run(1.25) == [(1.0, True)]
    assert machine.kernel.now_s == 1.25
    assert machine.run()[1:] == [(1.5, "late"), (1.5, "at once"), (2.0, "child"), (2.0, False)]


def test_a_thread_that_raises_is_noted(machine: Machine) -> None:
    machine.thread(lambda: 1 / 0)
    machine.kernel.run(1.0)
    [error] = machine.kernel.errors
    assert "ZeroDivisionError" in error
    assert "a thread of a raised" in error


def test_a_coroutine_that_blocks_its_event_loop_raises(machine: Machine) -> None:
    lock = Lock()

    async def blocks(by: Callable[[], object]) -> None:
        with lock:  # a free one does not block
            machine.say("before")
        lock.acquire()
        by()
        machine.say("after")

    for by in (lambda: sleep(0.1), lock.acquire):
        with machine.kernel.within(machine.a):
            task = machine.kernel.create_task(blocks(by))
        machine.kernel.run(1.0)
        assert "BlockedLoopError" in repr(task.exception())
        lock.release()
    assert [what for _, what in machine.said] == ["before"] * 2


def test_coroutines_sleep_in_the_same_time(machine: Machine) -> None:
    async def sleeps() -> None:
        await asyncio.sleep(0.25)
        machine.say("slept")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.sleep(9.0)
        machine.say("timed out")
        machine.say(await asyncio.get_running_loop().run_in_executor(None, lambda: sleep(1.0)))

    with machine.kernel.within(machine.a):
        machine.kernel.create_task(sleeps())
    assert machine.run() == [(0.25, "slept"), (0.75, "timed out"), (1.75, None)]


# Processes.


def test_nothing_of_a_process_that_ended_runs(machine: Machine) -> None:
    told: list[tuple[str, str]] = []
    machine.kernel.on_life = lambda process, what: told.append((process.name, what))
    machine.a.on_end.append(lambda: machine.say("ended"))
    machine.thread(machine.then(2.0, lambda: "a"))
    machine.thread(machine.then(2.0, lambda: "b"), machine.b)
    for at_s in (1.0, 1.5):
        machine.kernel.call_later(at_s, machine.kernel.end, machine.a)
    assert machine.run() == [(1.0, "ended"), (2.0, "b")]
    assert (machine.a.ended_at_s, machine.b.ended_at_s) == (1.0, None)
    machine.kernel.process("c", "a")
    assert told == [("a", "ends"), ("c", "begins")]


def test_a_lock_is_given_in_the_order_of_asking_and_not_waited_for_longer(machine: Machine) -> None:
    lock = Lock()
    machine.thread(machine.then(lock.acquire, 2.0, lock.release))
    machine.thread(machine.then(lambda: lock.acquire(blocking=False)))
    machine.thread(machine.then(lambda: lock.acquire(timeout=1.0)))
    machine.thread(machine.then(lambda: lock.acquire(timeout=5.0), 1.0, lock.release))
    machine.thread(machine.then(lock.acquire, lambda: "last", lock.release, lock.locked))
    assert machine.run() == [
        (0.0, True), (0.0, False), (1.0, False), (2.0, None), (2.0, True), (3.0, None),
        (3.0, True), (3.0, "last"), (3.0, None), (3.0, False),
    ]  # fmt: skip


def waiting(condition: Condition, timeout_s: float) -> Callable[[], bool]:
    def waits() -> bool:
        with condition:
            return condition.wait(timeout_s)

    return waits


def test_a_paused_process_does_late_what_was_due(machine: Machine) -> None:
    machine.thread(machine.then(1.0, lambda: "due at 1", 1.0, lambda: "and one more"))
    machine.kernel.pause(machine.a)
    machine.kernel.call_later(3.0, machine.kernel.go_on, machine.a)
    assert machine.run() == [(4.0, "due at 1"), (5.0, "and one more")]


def test_a_process_crashes_before_the_callback_that_is_named(machine: Machine) -> None:
    machine.thread(machine.then(1.0, lambda: 1, 1.0, lambda: 2, 1.0, lambda: 3))
    machine.kernel.crash_after(machine.a, 2, machine.kernel.end)  # its start, and the first sleep
    assert machine.run() == [(1.0, 1)]
    assert machine.a.ended_at_s == 2.0


# Locks, conditions, queues.


def test_an_rlock_is_its_threads_own(machine: Machine) -> None:
    lock = RLock()

    def nested() -> None:
        with lock:
            with lock:
                sleep(1.0)
            machine.say("half free")
            sleep(1.0)

    machine.thread(nested)
    machine.thread(machine.then(lock.acquire))
    assert machine.run() == [(1.0, "half free"), (2.0, True)]


@pytest.mark.parametrize(("count", "woken"), [(0, 0), (1, 1), (2, 2), (9, 3)])
def test_a_notice_wakes_as_many_as_it_says(machine: Machine, count: int, woken: int) -> None:
    condition = Condition()

    def notifies() -> None:
        with condition:
            condition.notify(count)

    for _ in range(3):
        machine.thread(machine.then(waiting(condition, 5.0)))
    machine.thread(machine.then(1.0, notifies))
    said = machine.run()
    assert said.count((1.0, True)) == woken
    assert said.count((5.0, False)) == 3 - woken


def test_a_notice_is_not_lost_on_a_wait_whose_time_is_over(machine: Machine) -> None:
    condition = Condition()

    def holds_then_notifies() -> None:
        with condition:
            sleep(2.0)  # the first waiter's time is over meanwhile
            condition.notify()

    machine.thread(machine.then(waiting(condition, 1.0)))
    machine.thread(machine.then(waiting(condition, 9.0)))
    machine.thread(machine.then(0.5, holds_then_notifies))
    assert machine.run() == [(2.5, None), (2.5, True), (2.5, False)]


def test_a_queue_gives_in_order_each_item_to_one_and_says_when_it_is_empty(
    machine: Machine,
) -> None:
    items = SimpleQueue()

    def get(timeout_s: float | None) -> object:
        try:
            return items.get(timeout=timeout_s)
        except queue.Empty:
            return "empty"

    with pytest.raises(queue.Empty):
        items.get_nowait()
    machine.thread(machine.then(lambda: get(0.5), lambda: get(None), lambda: get(1.0)))
    machine.thread(machine.then(lambda: get(None)))
    machine.thread(machine.then(1.0, *(lambda item=item: items.put(item) for item in range(3))))
    said = machine.run()
    assert said[0] == (0.5, "empty")
    assert {what for at_s, what in said if at_s == 1.0} == {None, 0, 1, 2}
    assert len(said) == 1 + 3 + 3
    assert (items.empty(), items.qsize()) == (True, 0)


@pytest.mark.parametrize(
    ("for_s", "end"),
    [(0.0, "end"), (TCP_TIMEOUT_S / 2, "end"), (3 * TCP_TIMEOUT_S, TimeoutError)],
)
def test_bytes_arrive_in_their_order_and_wait_for_a_link_that_is_cut_but_not_for_ever(
    machine: Machine, for_s: float, end: object
) -> None:
    for link in machine.network.links.values():
        link.jitter_s = 0.0 if for_s else 2.0
    server, got = listening(machine), []
    serve_all(machine, server, got)
    if for_s:
        cut(machine, 1.0, for_s)
    pieces = [b"late"] if for_s else [bytes([i]) * 40 for i in range(30)]

    def sends() -> None:
        sock = create_connection(server.getsockname(), 60.0)
        sleep(2.0)
        for piece in pieces:
            assert sock.send(piece) == len(piece)
            sleep(0.01)
        sock.close()

    machine.thread(sends)
    [(said_at_s, said)] = machine.run()
    assert said == end
    assert b"".join(got) == (b"".join(pieces) if end == "end" else b"")
    if for_s and end == "end":
        assert said_at_s == pytest.approx(1.0 + for_s, abs=0.1)


@pytest.mark.parametrize("is_host", [False, True])
def test_the_end_of_a_process_ends_its_connections_and_a_host_that_is_down_is_silent(
    machine: Machine, is_host: bool
) -> None:
    server, got = listening(machine), []
    serve_all(machine, server, got)

    def sends() -> None:
        sock = create_connection(server.getsockname())
        sock.send(b"last words")
        sleep(99.0)

    machine.thread(sends)
    if is_host:
        machine.kernel.call_later(1.0, machine.network.lose_host, "a")
    machine.kernel.call_later(1.0, machine.kernel.end, machine.a)
    [(at_s, said)] = machine.run()
    assert (said, got) == (TimeoutError if is_host else "end", [b"last words"])
    assert at_s == pytest.approx(1.0 + TCP_TIMEOUT_S * is_host, abs=0.1)


def test_a_predicate_is_waited_for(machine: Machine) -> None:
    condition, have = Condition(), []

    def waits(timeout_s: float | None) -> object:
        with condition:
            return condition.wait_for(lambda: len(have) > 1, timeout_s)

    def adds() -> None:
        with condition:
            have.append(1)
            condition.notify_all()

    machine.thread(machine.then(lambda: waits(1.5)))
    machine.thread(machine.then(lambda: waits(None)))
    machine.thread(machine.then(1.0, adds, 1.0, adds))
    assert machine.run() == [(1.0, None), (1.5, False), (2.0, None), (2.0, True)]


def test_an_event_lets_all_go_until_it_is_cleared(machine: Machine) -> None:
    event = Event()
    for _ in range(2):
        machine.thread(machine.then(event.wait, lambda: event.wait(1.0)))
    machine.thread(machine.then(2.0, event.set))
    machine.thread(machine.then(3.0, event.clear, lambda: event.wait(0.5)))
    assert machine.run() == [
        (2.0, None), (2.0, True), (2.0, True), (2.0, True), (2.0, True), (3.0, None), (3.5, False),
    ]  # fmt: skip


# Sockets and the network.


def listening(machine: Machine) -> Socket:
    """Return a socket that listens on ``b``."""
    with machine.kernel.within(machine.b):
        server = Socket(socket.AF_INET)
        server.bind((machine.network.addresses["b"], 0))
        server.listen()
    return server


def accepted(server: Socket) -> Socket:
    wait([server])
    return server.accept()[0]


def read(sock: Socket, room: int = 1 << 20) -> bytes:
    wait([sock])
    piece = bytearray(room)
    return bytes(piece[: sock.recv_into(piece)])


def serve_all(machine: Machine, server: Socket, got: list[bytes]) -> None:
    def run() -> None:
        sock = accepted(server)
        try:
            while piece := read(sock):
                got.append(piece)
            machine.say("end")
        except OSError as error:
            machine.say(type(error))

    machine.thread(run, machine.b)


def test_a_connection_holds_so_many_bytes_until_they_are_read(machine: Machine) -> None:
    server = listening(machine)

    def reads() -> None:
        sock = accepted(server)
        sleep(5.0)
        machine.say(len(read(sock)))

    def sends() -> None:
        sock = create_connection(server.getsockname())
        machine.say(sock.send(bytes(2 * WINDOW_BYTES)))
        with pytest.raises(BlockingIOError):
            sock.send(b"more")
        with Selector() as selector:
            selector.register(sock, selectors.EVENT_WRITE)
            assert len(selector.select()) == 1
        machine.say(sock.send(b"more"))

    machine.thread(reads, machine.b)
    machine.thread(sends)
    said = [what for _, what in machine.run()]
    assert said[0] == WINDOW_BYTES
    assert set(said[1:]) == {4, WINDOW_BYTES}
    assert machine.said[1][0] >= 5.0


def cut(machine: Machine, at_s: float, for_s: float) -> None:
    machine.kernel.call_at(at_s, machine.network.cut, [("a", "b")])
    machine.kernel.call_at(at_s + for_s, machine.network.heal)


def test_nobody_listens_or_nobody_answers(machine: Machine) -> None:
    server = listening(machine)
    host, port = server.getsockname()

    def tries(address: tuple[str, int], timeout_s: float) -> object:
        try:
            return create_connection(address, timeout_s)
        except OSError as error:
            return type(error)

    cut(machine, 1.0, 9.0)
    machine.thread(machine.then(lambda: tries((host, port + 1), 1.0)))
    machine.thread(machine.then(2.0, lambda: tries((host, port), 3.0)))
    assert machine.run() == [(0.0, ConnectionRefusedError), (5.0, TimeoutError)]


def test_a_unix_socket_reaches_its_own_host_alone_whatever_happens_to_links(
    machine: Machine,
) -> None:
    name, got = b"\0name", []
    with machine.kernel.within(machine.b):
        server = Socket(socket.AF_UNIX)
        server.bind(name)
        server.listen()
    serve_all(machine, server, got)
    for link in machine.network.links.values():
        link.is_cut, link.damage = True, 1.0

    async def sends() -> None:
        sock = Socket(socket.AF_UNIX)
        try:
            await machine.kernel.sock_connect(sock, name)
        except OSError as error:
            machine.say(type(error))
            return
        _, writer = await asyncio.open_unix_connection(sock=sock)  # type: ignore[arg-type]
        writer.write(b"whole")
        writer.close()

    def begin(process: Process, at_s: float) -> None:
        with machine.kernel.within(process):
            machine.kernel.call_at(at_s, lambda: machine.kernel.create_task(sends()))

    begin(machine.a, 1.0)
    begin(machine.b, 2.0)
    machine.kernel.call_at(3.0, machine.network.hide, machine.b)
    begin(machine.b, 4.0)
    said = machine.run()
    assert [what for _, what in said] == [ConnectionRefusedError, "end", ConnectionRefusedError]
    assert said[1][0] == pytest.approx(2.0, abs=0.001)
    assert b"".join(got) == b"whole"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_damage_changes_one_bit(machine: Machine, share: float) -> None:
    for link in machine.network.links.values():
        link.damage = share
    sent = bytes(range(200))
    arrived = machine.network.damaged("a", "b", sent)
    bits = sum((x ^ y).bit_count() for x, y in zip(sent, arrived, strict=True))
    assert bits == share
    assert machine.network.damaged("a", "a", sent) == sent
    assert machine.network.damaged("a", "b", b"") == b""


def test_a_selector_waits_for_any_of_its_sockets_or_for_its_time(machine: Machine) -> None:
    server = listening(machine)

    def reads() -> None:
        socks = [accepted(server) for _ in range(2)]
        with Selector() as selector:
            machine.say(selector.select(0.5))
            for place, sock in enumerate(socks):
                selector.register(sock, selectors.EVENT_READ, place)
            machine.say(selector.select(0))
            machine.say([key.data for key, _ in selector.select(0.5)])
            machine.say([key.data for key, _ in selector.select()])

    def sends() -> None:
        first, second = (create_connection(server.getsockname()) for _ in range(2))
        sleep(3.0)
        second.send(b"x")
        sleep(1.0)
        first.close()

    machine.thread(reads, machine.b)
    machine.thread(sends)
    assert [what for _, what in machine.run()] == [[], [], [], [1]]
    assert machine.said[-1][0] == pytest.approx(3.0, abs=0.1)
