"""Ray as a world has it: nodes, actors, calls of actors, and the store of the head.

Only what the product uses. A call is a message to a process and one back. An actor that dies fails
its calls after a while, and a call whose messages cannot pass fails as unavailable.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RaySystemError,
    RayTaskError,
)

from tests.world.kernel import Kernel, Process, Waiter, current_process
from tests.world.network import TCP_TIMEOUT_S, Network

HEAD = "head"
CONTROL = ("load", "unload", "heartbeat", "describe", "offer_stream")
CONTROL_CALLS = 4
START_S = (0.2, 0.8)
NODE_DEATH_S = (2.0, 4.0)
"""How long Ray takes to notice that a node is gone."""
CRASHED = "worker process has died"


class DiedError(ActorDiedError):
    """The death of an actor, with Ray's words for its cause."""

    def __init__(self, cause: str) -> None:
        super().__init__()
        self.cause_text = cause

    def __str__(self) -> str:
        return f"The actor died unexpectedly before finishing this task: {self.cause_text}"


@dataclass(frozen=True)
class NodeAffinity:
    """Takes the place of Ray's strategy of this name, which wants other ids of nodes."""

    node_id: str
    soft: bool


@dataclass(eq=False)
class Node:
    """A node of Ray; its actors take a slot each."""

    name: str
    num_slots: int
    is_alive: bool = True
    is_draining: bool = False
    actors: list[Handle] = field(default_factory=list)

    def may_start(self) -> bool:
        """Return whether Ray starts actors there; it ignores an affinity to a node that drains."""
        return self.is_alive and not self.is_draining

    def free_slots(self) -> int:
        return self.num_slots - sum(actor.process.is_alive for actor in self.actors)


class Call:
    """A call under way: what ``remote`` returns. It can be awaited, and waited for by threads."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.is_done = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.on_done: list[Callable[[], None]] = []
        self.on_cancel: Callable[[], None] = lambda: None
        self.process = current_process()

    def finish(self, value: Any, error: BaseException | None = None) -> None:
        """Take the answer; later ones are ignored."""
        if not self.is_done:
            self.is_done, self.value, self.error = True, value, error
            for call in self.on_done:
                call()

    def cancel(self) -> None:
        self.on_cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.is_done:
            future = self._kernel.create_future()
            self.on_done.append(lambda: future.done() or future.set_result(None))
            yield from future
        return self.result()

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self._name = name

    def remote(self, *args: Any) -> Call:
        return self._handle.call(self._name, args)


class Handle:
    """An actor: its process, and the object in it."""

    def __init__(self, cluster: RayCluster, name: str, process: Process, node: Node) -> None:
        self.cluster = cluster
        self.name = name
        self.process = process
        self.node = node
        self.instance: Any = None
        self.is_started = False
        self.death = CRASHED
        self._waiting: list[Callable[[], None]] = []
        self._control: deque[Callable[[], None]] = deque()
        self._num_control = 0
        self._calls: dict[Call, None] = {}

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Method(self, name)

    def start(self, make: Callable[[], Any]) -> None:
        """Make the object in the actor's process; runs on a thread of it."""
        try:
            self.instance = make()
        except Exception as error:
            self.cluster.kernel.note(f"{self.name} did not start: {error!r}")
            return
        self.is_started = True
        for call in self._waiting:
            call()
        self._waiting.clear()

    def call(self, method: str, args: Sequence[Any]) -> Call:
        cluster, call = self.cluster, Call(self.cluster.kernel)
        self._calls[call] = None
        call.on_done.append(lambda: self._calls.pop(call, None))
        if self.process.is_alive:
            cluster.send(call, self.process, lambda: self._arrived(call, method, args))
        else:  # Ray's head knows, or will soon
            cluster.fail_later(call, self)
        return call

    def _arrived(self, call: Call, method: str, args: Sequence[Any]) -> None:
        """Begin a call in the actor's process."""
        if not self.process.is_alive:
            self.cluster.fail_later(call, self)
            return
        if not self.is_started:
            self._waiting.append(lambda: self._arrived(call, method, args))
            return
        if method in CONTROL:
            if self._num_control >= CONTROL_CALLS:
                self._control.append(lambda: self._arrived(call, method, args))
                return
            self._num_control += 1
        self.cluster.on_call(self, method, args)
        self.cluster.run(call, self.process, getattr(self.instance, method), args, method, self)

    def ended(self, method: str) -> None:
        if method in CONTROL:
            self._num_control -= 1
            if self._control:
                self._control.popleft()()

    def died(self) -> None:
        for call in list(self._calls):
            self.cluster.fail_later(call, self)


class _ActorClass:
    def __init__(self, cluster: RayCluster, actor_class: type) -> None:
        self._cluster = cluster
        self._class = actor_class
        self._options: dict[str, Any] = {}

    def options(self, **options: Any) -> _ActorClass:
        other = _ActorClass(self._cluster, self._class)
        other._options = options
        return other

    def remote(self, *args: Any) -> Handle:
        return self._cluster.create(self._class, args, self._options)


class RayCluster:
    def __init__(self, kernel: Kernel, network: Network, nodes: dict[str, int]) -> None:
        """``nodes`` has the number of actors that fit on each node."""
        self.kernel = kernel
        self.network = network
        self.nodes = {name: Node(name, slots) for name, slots in nodes.items()}
        self.actors: dict[str, Handle] = {}
        self.store: dict[str, bytes] = {}
        self.on_kill: Callable[[Handle, Process | None], None] = lambda handle, killer: None
        """Called when an actor is ordered to be killed."""
        self.on_record: Callable[[str, bytes], None] = lambda key, value: None
        """Called when a value is put into the store, by its key."""
        self.on_place: Callable[[Handle], None] = lambda handle: None
        """Called when an actor gets its node."""
        self.on_call: Callable[[Handle, str, Sequence[Any]], None] = lambda handle, name, args: None
        """Called when a method of an actor begins."""
        self.duplicates = 0.0
        """The share of calls that an actor is given twice."""
        self.lost = 0.0
        """The share of calls whose answer is lost, so that they fail as unavailable."""
        self.cut_off: set[int] = set()
        """The processes, by their ids, whose calls to actors wait for the network."""
        self._pending: list[tuple[Handle, Callable[[], Any], str | None]] = []

    # Messages.

    def send(self, call: Call, target: Process, arrive: Callable[[], None]) -> None:
        """Bring a message from the current process to another, or fail the call."""
        source = call.process.node if call.process else HEAD
        is_cut_off = call.process is not None and call.process.pid in self.cut_off
        if is_cut_off and target.name in self.actors:
            self._wait_for_network(call, lambda: self.send(call, target, arrive))
            return
        self._pass(call, source, target.node or HEAD, arrive)
        if self.duplicates and self.kernel.random.random() < self.duplicates:
            self._pass(call, source, target.node or HEAD, arrive)

    def _pass(self, call: Call, source: str, target: str, arrive: Callable[[], None]) -> None:
        """Have a message arrive, later where the link is cut."""
        if self.network.is_cut(source, target):
            self._wait_for_network(call, lambda: self._pass(call, source, target, arrive))
            return
        delay_s = self.network.delay_s(source, target)
        self.kernel.call_later(delay_s, arrive, context=self.network.nobody)

    def _wait_for_network(self, call: Call, again: Callable[[], None]) -> None:
        """Send again once the network is mended; the call fails where that takes long."""
        self.network.when_mended(again)
        error, nobody = ActorUnavailableError("the connection broke", None), self.network.nobody
        self.kernel.call_later(2 * TCP_TIMEOUT_S, call.finish, None, error, context=nobody)

    def fail_later(self, call: Call, handle: Handle) -> None:
        """Fail a call of a dead actor, once Ray notices its death."""
        low, high = (0.01, 0.2) if handle.node.is_alive else NODE_DEATH_S
        delay_s = self.kernel.random.uniform(low, high)
        error = DiedError(handle.death)
        self.kernel.call_later(delay_s, call.finish, None, error, context=self.network.nobody)

    def run(
        self, call: Call, process: Process, method: Callable[..., Any], args: Sequence[Any],
        name: str, handle: Any,
    ) -> None:  # fmt: skip
        """Run a method in its process, and send its result back."""

        def answered(value: Any, error: BaseException | None) -> None:
            handle.ended(name)
            if self.lost and self.kernel.random.random() < self.lost:
                value, error = None, ActorUnavailableError("the answer was lost", None)
            source = call.process.node if call.process else HEAD
            self._pass(call, process.node, source, lambda: call.finish(value, error))

        async def run_coroutine() -> None:
            try:
                answer = await method(*args), None
            except asyncio.CancelledError:
                answered(None, asyncio.CancelledError())
                raise
            except Exception as error:
                answer = None, _as_raised(error)
            answered(*answer)

        def run_method() -> None:
            try:
                answer = method(*args), None
            except Exception as error:
                answer = None, _as_raised(error)
            answered(*answer)

        with self.kernel.within(process):
            if inspect.iscoroutinefunction(method):
                task = self.kernel.create_task(run_coroutine())

                def cancel() -> None:
                    source = call.process.node if call.process else HEAD
                    self._pass(call, source, process.node, lambda: self._cancel(process, task))

                call.on_cancel = cancel
            else:
                self.kernel.spawn(run_method)

    def _cancel(self, process: Process, task: asyncio.Task[None]) -> None:
        if process.is_alive:
            with self.kernel.within(process):
                task.cancel()

    # Nodes and actors.

    def remote(self, **_: Any) -> Callable[[type], _ActorClass]:
        return lambda actor_class: _ActorClass(self, actor_class)

    def create(self, actor_class: type, args: Sequence[Any], options: dict[str, Any]) -> Handle:
        """Take a new actor; it starts once a node has room."""
        name = options["name"]
        process = self.kernel.process(name, "")
        handle = Handle(self, name, process, Node("", 0))
        process.on_end.append(handle.died)
        self.actors[name] = handle
        strategy = options.get("scheduling_strategy")
        wanted = strategy.node_id if isinstance(strategy, NodeAffinity) else None
        self._pending.append((handle, lambda: actor_class(*args), wanted))
        self.kernel.call_later(0.001, self.place_pending, context=self.network.nobody)
        return handle

    def place_pending(self) -> None:
        """Start the actors that have waited for a place and have one."""
        pending, self._pending = self._pending, []
        for handle, make, wanted in pending:
            if not handle.process.is_alive:
                continue
            node = self._choose(wanted)
            if node is None:
                self._pending.append((handle, make, wanted))
                continue
            handle.node = node
            handle.process.node = node.name
            node.actors.append(handle)
            self.on_place(handle)
            with self.kernel.within(handle.process):
                delay_s = self.kernel.random.uniform(*START_S)
                self.kernel.call_later(
                    delay_s, self.kernel.spawn, lambda h=handle, m=make: h.start(m)
                )

    def _choose(self, wanted: str | None) -> Node | None:
        """Choose the node of an actor; one that wants a living node waits for it."""
        if wanted is not None and (node := self.nodes.get(wanted)) is not None and node.may_start():
            return node if node.free_slots() > 0 else None
        free = [n for n in self.nodes.values() if n.may_start() and n.free_slots() > 0]
        return max(free, key=lambda n: (n.free_slots(), n.name), default=None)

    def kill(self, handle: Handle, no_restart: bool = True) -> None:
        killer = current_process()
        self.on_kill(handle, killer)
        source = killer.node if killer else HEAD
        target = handle.process.node or HEAD

        def arrive() -> None:
            handle.death = "it was killed by ray.kill"
            self.end(handle)

        call = Call(self.kernel)
        self._pass(call, source, target, arrive)

    def end(self, handle: Handle) -> None:
        self.kernel.end(handle.process)
        self.actors.pop(handle.name, None)
        self.kernel.call_later(0.1, self.place_pending, context=self.network.nobody)

    def lose_node(self, name: str) -> None:
        """Take a node down with all its processes; actors of it are known as dead later."""
        node = self.nodes[name]
        self.network.lose_host(name)
        node.is_alive = False
        for handle in list(node.actors):
            if handle.process.is_alive:
                handle.death = "its node died"
                self.end(handle)

    def add_node(self, name: str, num_slots: int) -> None:
        self.network.add_host(name)
        self.nodes[name] = Node(name, num_slots)
        self.place_pending()

    # What the product asks Ray.

    def get(self, calls: Call | Sequence[Call], timeout: float | None = None) -> Any:
        """Take the place of ``ray.get``, on a thread."""
        many = [calls] if isinstance(calls, Call) else list(calls)
        until_s = None if timeout is None else self.kernel.now_s + timeout
        for call in many:
            while not call.is_done:
                left_s = None if until_s is None else until_s - self.kernel.now_s
                if left_s is not None and left_s <= 0:
                    raise GetTimeoutError("the time is over")
                waiter = Waiter(self.kernel)
                call.on_done.append(waiter.wake)
                waiter.wait(left_s)
        values = [call.result() for call in many]
        return values[0] if isinstance(calls, Call) else values

    def ask_head(self) -> None:
        """Wait for a round trip to the head, on a thread; raises where the link stays cut."""
        process = current_process()
        source = process.node if process else HEAD
        until_s = self.kernel.now_s + TCP_TIMEOUT_S
        while self.network.is_cut(source, HEAD) or self.network.is_cut(HEAD, source):
            if self.kernel.now_s >= until_s:
                raise RaySystemError("Ray's head does not answer")
            Waiter(self.kernel).wait(0.1)
        Waiter(self.kernel).wait(
            self.network.delay_s(source, HEAD) + self.network.delay_s(HEAD, source)
        )

    def get_actor(self, name: str, namespace: str = "") -> Handle:
        self.ask_head()
        if name not in self.actors:
            raise ValueError(name)
        return self.actors[name]

    def list_named_actors(self, all_namespaces: bool = True) -> list[dict[str, str]]:
        self.ask_head()
        return [{"name": name, "namespace": "serve"} for name in self.actors]

    def list_nodes(self) -> list[dict[str, Any]]:
        self.ask_head()
        return [
            {"NodeID": n.name, "Alive": n.is_alive, "Resources": {"CPU": float(n.num_slots)}}
            for n in self.nodes.values()
        ]

    def available(self) -> dict[str, dict[str, float]]:
        return {n.name: {"CPU": float(n.free_slots())} for n in self.nodes.values() if n.is_alive}

    def draining(self) -> dict[str, int]:
        return {n.name: 0 for n in self.nodes.values() if n.is_alive and n.is_draining}

    def put(self, key: str, value: bytes, overwrite: bool = False, namespace: str = "") -> bool:
        self.ask_head()
        existed = key in self.store
        if overwrite or not existed:
            self.store[key] = value
            self.on_record(key, value)
        return existed

    def get_value(self, key: str, namespace: str = "") -> bytes | None:
        self.ask_head()
        return self.store.get(key)

    def list_keys(self, prefix: str, namespace: str = "") -> list[bytes]:
        self.ask_head()
        return [key.encode() for key in self.store if key.startswith(prefix)]

    def delete(self, key: str, namespace: str = "") -> None:
        self.ask_head()
        self.store.pop(key, None)


def _as_raised(error: Exception) -> Exception:
    """Return a method's error as its caller gets it, which is one of both classes."""
    raised: Exception = RayTaskError(
        "method", repr(error), error, "process", 1, "host"
    ).as_instanceof_cause()
    return raised
