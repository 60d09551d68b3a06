"""What of the real machine a world replaces: the operating system, Ray, and the model's files.

The product's own code runs as it is; each entry is a name that it looks up when it is called.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import os
import queue
import random
import secrets
import selectors
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray

import cluster.controller.controller
import cluster.controller.lifecycle.lease
import cluster.controller.records.ledger
import cluster.controller.records.pool
import cluster.transport.stream.channel
import cluster.transport.stream.connect
import experts.actor
import experts.host_room
import router.engine.batch
import router.engine.constraints
import router.engine.replica
from cluster.controller.changes.anti_affinity import AntiAffinity
from cluster.controller.records.fleet import Fleet
from cluster.controller.records.state import ClusterState
from cluster.tls import TlsFiles
from tests.world import locks, sockets
from tests.world.kernel import PROCESS, ProcessExit, Thread, current_process
from tests.world.mixtures import mixture_table
from tests.world.natives import native_table
from tests.world.ray_api import HEAD, NodeAffinity

if TYPE_CHECKING:
    from tests.world.world import World


Table = list[tuple[Any, str, Any]]
"""Owners, their names, and what takes the place of what they have."""


@contextlib.contextmanager
def replaced(world: World) -> Iterator[None]:
    """Replace all inside."""
    table = [*_of_the_system(world), *_of_ray(world), *_of_the_product(world)]
    state = random.getstate()
    random.seed(world.seed)  # what the product draws without a generator of its own
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in table]
    for owner, name, value in table:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        random.setstate(state)


def _node() -> str:
    process = current_process()
    return HEAD if process is None else process.node


def _of_the_system(world: World) -> Table:
    kernel, process_now = world.kernel, PROCESS.get

    def monotonic() -> float:  # the most frequent of all calls
        process = process_now()
        return kernel.now_s if process is None else kernel.now_s + process.monotonic_s

    def wall() -> float:
        process = current_process()
        return 1.7e9 + kernel.now_s + (0.0 if process is None else process.wall_s)

    def pid() -> int:
        process = current_process()
        return 1 if process is None else process.pid

    def exit_now(code: int) -> None:
        process = current_process()
        assert process is not None
        world.ends.exits(process, code)
        world.end(process)
        raise ProcessExit

    def token_bytes(count: int = 32) -> bytes:
        return kernel.random.randbytes(count)

    return [
        (time, "monotonic", monotonic),
        (time, "perf_counter", monotonic),
        (time, "time", wall),
        (time, "sleep", locks.sleep),
        (threading, "Thread", Thread),
        (threading, "Lock", locks.Lock),
        (threading, "RLock", locks.RLock),
        (threading, "Condition", locks.Condition),
        (threading, "Event", locks.Event),
        (threading, "current_thread", locks.current_thread),
        (queue, "SimpleQueue", locks.SimpleQueue),
        (router.engine.constraints, "SimpleQueue", locks.SimpleQueue),
        # A thread and its queue refer to each other, so the process's own would keep both.
        (concurrent.futures.thread, "_threads_queues", {}),
        (socket, "socket", sockets.Socket),
        (socket, "create_connection", sockets.create_connection),
        (socket, "gethostname", _node),
        (ssl, "SSLSocket", sockets.TlsSocket),
        (selectors, "DefaultSelector", sockets.Selector),
        (os, "getpid", pid),
        (os, "_exit", exit_now),
        (secrets, "token_bytes", token_bytes),
        (secrets, "token_hex", lambda count=32: token_bytes(count).hex()),
        (secrets, "randbits", kernel.random.getrandbits),
        (uuid, "uuid4", lambda: uuid.UUID(int=kernel.random.getrandbits(128))),
    ]


def _of_ray(world: World) -> Table:
    own, context = world.cluster, SimpleNamespace(get_node_id=_node)
    private, store = ray._private.state, ray.experimental.internal_kv
    return [
        (ray, "get", own.get),
        (ray, "get_actor", own.get_actor),
        (ray, "kill", own.kill),
        (ray, "nodes", own.list_nodes),
        (ray, "remote", own.remote),
        (ray, "get_runtime_context", lambda: context),
        (ray.util, "get_node_ip_address", lambda: own.network.addresses[_node()]),
        (private, "available_resources_per_node", own.available),
        (private, "state", SimpleNamespace(get_draining_nodes=own.draining)),
        (store, "_internal_kv_put", own.put),
        (store, "_internal_kv_get", own.get_value),
        (store, "_internal_kv_list", own.list_keys),
        (store, "_internal_kv_del", own.delete),
        (cluster.controller.records.pool, "list_named_actors", own.list_named_actors),
        (cluster.controller.records.pool, "NodeAffinitySchedulingStrategy", NodeAffinity),
        (cluster.controller.lifecycle.lease, "list_named_actors", own.list_named_actors),
    ]


def _of_the_product(world: World) -> Table:
    """Replace what reads a model's files, and let the law look on."""
    move, publish, take = AntiAffinity._move, ClusterState.publish, Fleet.take_into_use

    async def moved(anti_affinity: AntiAffinity, actor_id: str) -> None:
        world.moving.add(actor_id)
        world.places.moved.add(actor_id)
        try:
            await move(anti_affinity, actor_id)
        finally:
            world.moving.discard(actor_id)

    def taken(fleet: Fleet, actor_id: str) -> None:
        world.places.taken(actor_id)
        take(fleet, actor_id)

    async def published(state: ClusterState, change: Any) -> None:
        before = state.placement
        await publish(state, change)
        world.law.published(before, state.placement, state)

    table: Table = [
        (TlsFiles, "server_context", lambda files, where="": sockets.Tls()),
        (TlsFiles, "client_context", lambda files: sockets.Tls()),
        (cluster.transport.stream.connect, "wait", sockets.wait),
        *native_table(world),
        *mixture_table(world),
        (cluster.controller.controller, "app_is_wanted", world.serve.app_is_wanted),
        (router.engine.replica, "app_is_wanted", world.serve.app_is_wanted),
        (ClusterState, "publish", published),
        (AntiAffinity, "_move", moved),
        (Fleet, "take_into_use", taken),
        (router.engine.replica, "_load_dense", world.load_dense),
        (experts.actor, "load_expert", world.load_expert),
        (experts.actor, "GatedFfnExpert", world.make_expert),
        (experts.actor, "memory", world.memory),
        (experts.host_room, "memory", world.memory),
    ]
    if world.setting.tls:
        # So that a short step comes in pieces, and messages are longer than what is read at once.
        table += [
            (router.engine.batch, "MIN_PIECE_TOKENS", 3),
            (cluster.transport.stream.channel, "BUFFER_BYTES", 128),
        ]
    return table
