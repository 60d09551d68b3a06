"""Serve as a world has it: deployments, their replicas, and handles that call them.

A replica that dies is replaced. A new version's replicas start beside the old ones, which then end
once they owe no answer. A handle calls one of two running replicas, the one that owes less.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.world.kernel import Process, current_process
from tests.world.ray_api import HEAD, NODE_DEATH_S, Call, Handle, RayCluster

RESTART_S = (0.1, 0.8)
START_S = (0.2, 0.8)
LOOK_S = 0.1
DRAIN_S = 20.0
HEALTH_S = 2.0


@dataclass(eq=False)
class Version:
    """What a deployment's replicas are made of.

    ``make`` returns the object, or a coroutine of it; ``is_ready`` says whether it is to serve.
    ``close`` is called, and awaited, at its graceful end.
    """

    make: Callable[[], Any]
    num_replicas: int
    is_ready: Callable[[Any], bool] = lambda instance: True
    close: Callable[[Any], Any] = lambda instance: None
    check: Callable[[Any], Any] | None = None
    """Awaited every :data:`HEALTH_S`; a replica at which it raises is replaced."""


@dataclass(eq=False)
class Replica:
    """A replica, and what it owes an answer."""

    handle: Handle
    version: Version
    is_running: bool = False
    is_draining: bool = False
    owed: dict[Call, None] = field(default_factory=dict)
    num_requests: int = 0
    """The requests of clients that a gateway serves."""

    @property
    def process(self) -> Process:
        return self.handle.process


class Deployment:
    """The replicas of one deployment."""

    def __init__(self, serve: Serve, name: str) -> None:
        self.name = name
        self.replicas: list[Replica] = []
        self.version: Version | None = None
        self._serve = serve
        self._numbers = itertools.count(1)
        self._queue: list[Callable[[], None]] = []

    def running(self) -> list[Replica]:
        return [r for r in self.replicas if r.is_running and r.process.is_alive]

    def deploy(self, version: Version) -> None:
        self.version = version
        self.reconcile()

    def reconcile(self) -> None:
        """Start what is missing, and drain what is too much."""
        version, serve = self.version, self._serve
        self.replicas = [r for r in self.replicas if r.process.is_alive]
        wanted = version.num_replicas if version is not None and serve.is_wanted else 0
        current = [r for r in self.replicas if r.version is version and not r.is_draining]
        for _ in range(wanted - len(current)):
            assert version is not None
            self._start(version)
        ready = [r for r in current if r.is_running]
        if len(ready) >= wanted:
            kept = current[:wanted]
            for replica in self.replicas:
                if replica not in kept and not replica.is_draining:
                    self._drain(replica)

    def _start(self, version: Version) -> None:
        cluster = self._serve.cluster
        nodes = [n for n in cluster.nodes.values() if n.is_alive]
        if not nodes:
            return
        counts = {n.name: sum(r.process.node == n.name for r in self.replicas) for n in nodes}
        node = min(nodes, key=lambda n: (counts[n.name], self._serve.kernel.random.random()))
        process = self._serve.kernel.process(f"{self.name}/{next(self._numbers)}", node.name)
        handle = Handle(cluster, process.name, process, node)
        replica = Replica(handle, version)
        self.replicas.append(replica)
        process.on_end.append(lambda: self._ended(replica))
        with self._serve.kernel.within(process):
            delay_s = self._serve.kernel.random.uniform(*START_S)
            self._serve.kernel.call_later(
                delay_s, self._serve.kernel.spawn, lambda: self._begin(replica)
            )

    def _begin(self, replica: Replica) -> None:
        """Make a replica's object, on a thread of its process."""
        made: list[Any] = []

        def make() -> Any:
            made.append(replica.version.make())
            return made[0]

        replica.handle.start(make)
        if made:
            self._serve.kernel.create_task(self._wait_until_ready(replica))

    async def _wait_until_ready(self, replica: Replica) -> None:
        if inspect.isawaitable(replica.handle.instance):
            try:
                replica.handle.instance = await replica.handle.instance
            except Exception:  # Serve tries again
                replica.handle.death = "its constructor raised"
                self._serve.kernel.end(replica.process)
                return
        while not replica.version.is_ready(replica.handle.instance):
            await asyncio.sleep(LOOK_S)
        replica.is_running = True
        self.reconcile()
        queue, self._queue = self._queue, []
        for call in queue:
            call()
        if replica.version.check is not None:
            await self._check(replica, replica.version.check)

    async def _check(self, replica: Replica, check: Callable[[Any], Any]) -> None:
        """End a replica that says that it is not healthy."""
        while True:
            await asyncio.sleep(HEALTH_S)
            try:
                await check(replica.handle.instance)
            except Exception:
                replica.handle.death = "Serve has stopped it"
                self._serve.kernel.end(replica.process)
                return

    def _ended(self, replica: Replica) -> None:
        """Fail the calls of a replica that has died, and replace it."""
        kernel, nobody = self._serve.kernel, self._serve.cluster.network.nobody
        replica.is_running = False
        for call in list(replica.owed):
            self._serve.cluster.fail_later(call, replica.handle)
        is_node = not replica.handle.node.is_alive
        delay_s = kernel.random.uniform(*(NODE_DEATH_S if is_node else RESTART_S))
        kernel.call_later(delay_s, self.reconcile, context=nobody)

    def _drain(self, replica: Replica) -> None:
        replica.is_draining, replica.is_running = True, False
        with self._serve.kernel.within(replica.process):
            self._serve.kernel.create_task(self._end_when_idle(replica))

    async def _end_when_idle(self, replica: Replica) -> None:
        until_s = self._serve.kernel.now_s + DRAIN_S
        while (replica.owed or replica.num_requests) and self._serve.kernel.now_s < until_s:
            await asyncio.sleep(LOOK_S)
        if replica.handle.is_started and not inspect.isawaitable(replica.handle.instance):
            closing = await self._serve.kernel.run_in_executor(
                None, replica.version.close, replica.handle.instance
            )
            if inspect.isawaitable(closing):
                await closing
        replica.handle.death = "Serve has stopped it"
        self._serve.kernel.end(replica.process)

    # Calls.

    def call(self, call: Call, method: str, args: tuple[Any, ...]) -> None:
        source = call.process.node if call.process else HEAD
        network = self._serve.cluster.network
        reachable = [r for r in self.running() if not network.is_cut(source, r.process.node)]
        reachable = reachable or self.running()
        if not reachable:
            self._queue.append(lambda: call.is_done or self.call(call, method, args))
            return
        two = self._serve.kernel.random.sample(reachable, min(2, len(reachable)))
        self._send(min(two, key=lambda r: len(r.owed)), call, method, args)

    def call_all(self, method: str, args: tuple[Any, ...]) -> list[Call]:
        calls = []
        for replica in self.running():
            calls.append(Call(self._serve.kernel))
            self._send(replica, calls[-1], method, args)
        return calls

    def _send(self, replica: Replica, call: Call, method: str, args: tuple[Any, ...]) -> None:
        replica.owed[call] = None
        call.on_done.append(lambda: replica.owed.pop(call, None))
        self._serve.cluster.send(
            call, replica.process, lambda: self._arrived(replica, call, method, args)
        )

    def _arrived(self, replica: Replica, call: Call, method: str, args: tuple[Any, ...]) -> None:
        if not replica.process.is_alive:
            self._serve.cluster.fail_later(call, replica.handle)
            return
        bound = getattr(replica.handle.instance, method)
        self._serve.cluster.run(call, replica.process, bound, args, method, _NO_HANDLE)


class _NoHandle:
    def ended(self, method: str) -> None:
        """Serve counts the calls itself."""


_NO_HANDLE = _NoHandle()


class ServeHandle:
    """Takes the place of Serve's handle of a deployment."""

    def __init__(self, serve: Serve, name: str) -> None:
        self._serve = serve
        self._name = name
        self._method = ""

    def __getattr__(self, name: str) -> ServeHandle:
        if name.startswith("__"):
            raise AttributeError(name)
        bound = ServeHandle(self._serve, self._name)
        bound._method = name
        return bound

    def remote(self, *args: Any) -> Call:
        call = Call(self._serve.kernel)
        self._serve.deployments[self._name].call(call, self._method, args)
        return call

    def broadcast(self, method: str, *args: Any) -> Broadcast:
        return Broadcast(self._serve.deployments[self._name].call_all(method, args))


class Broadcast:
    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        """Return all answers, and errors in their places."""
        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*self._calls, return_exceptions=return_exceptions)


class Serve:
    """The deployments of one application, by name."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster
        self.kernel = cluster.kernel
        self.deployments: dict[str, Deployment] = {}
        self.is_wanted = True

    def deploy(self, name: str, version: Version) -> None:
        self.deployments.setdefault(name, Deployment(self, name)).deploy(version)

    def handle(self, name: str) -> ServeHandle:
        """Return a handle; the deployment may come later."""
        self.deployments.setdefault(name, Deployment(self, name))
        return ServeHandle(self, name)

    def app_is_wanted(self, app: str) -> bool:
        """Take the place of :func:`cluster.controller.application.app_is_wanted`."""
        process = current_process()
        if process is not None:
            self.cluster.ask_head()
        return self.is_wanted

    def delete(self) -> None:
        self.is_wanted = False
        for deployment in self.deployments.values():
            deployment.reconcile()
