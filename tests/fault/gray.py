"""Faults of parts that go on living: broken and slow devices, poison, networks that are cut.

Each fault is carried out on a running cluster, is seen to have hit, and is over when its method
returns. Used by ``benchmarks.gray_soak``, so nothing here knows of pytest.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx

from cluster.errors import ExpertMeshError
from cluster.reports import ActorStatus, ClusterStatus
from cluster.spec import ActorSpec
from cluster.wire.frames import Buffer
from experts.remote import RemoteExpertActor
from router.client import Client, Sampling
from router.moe.copy_choice import AVOID_S
from router.serve.controller import ControllerDeployment
from tests.fault.network import Network, namespace_of

FOLDER = "EXPERTMESH_TEST_GRAY"
"""The variable of a process's environment that names the folder of the files about actors."""
SLOWER = 5.0
"""How many times longer a slow actor takes."""
SLOW_S, CUT_CONTROLLER_S, CUT_ROUTER_S = 10.0, 10.0, 6.0
LIMIT_S, POLL_S = 150.0, 0.2
ROUTERS = 2
CUT_AT_MOST_S = 30.0
"""How much longer a router is cut off while nobody asks it for anything."""
QUIET_S = 12.0
"""Longer than the controller takes to notice a node."""
POISON_TIMEOUT_S = 120.0


class Gray(enum.StrEnum):
    """The part that a fault hits, and its fault."""

    BROKEN = "actor that raises on every product"
    SLOW = "actor five times slower"
    POISON_REQUEST = "poison request"
    POISON_FRAME = "poison frame"
    CUT_CONTROLLER = "controller cut off from all actors"
    CUT_ROUTER = "router cut off from half of the actors"


class GrayActor(RemoteExpertActor):
    """An actor that fails or slows down while there is a file for its process."""

    def __init__(self, spec: ActorSpec, actor_id: str, generation: int, epoch: int) -> None:
        """See :class:`RemoteExpertActor`."""
        super().__init__(spec, actor_id, generation, epoch)
        from experts import bank, queue

        queue.IS_BUILT = False  # frames that come alone are computed by the bank as well
        product = bank.compute_native
        folder, pid = Path(os.environ[FOLDER]), os.getpid()
        broken, slow, hit = (folder / f"{what}-{pid}" for what in ("broken", "slow", "hit"))

        def computed(experts: Sequence[Any], counts: Any, rows: Buffer) -> memoryview | None:
            if broken.exists():
                hit.touch()
                raise RuntimeError("the device fails")
            began_s = time.perf_counter()
            output: memoryview | None = product(experts, counts, rows)
            if slow.exists():
                hit.touch()
                time.sleep((SLOWER - 1) * (time.perf_counter() - began_s))
            return output

        bank.compute_native = computed


class GrayController(ControllerDeployment):
    """A controller of such actors."""

    actor_class: ClassVar[type] = GrayActor


def settled(client: Client) -> None:
    """Wait until no actor has been moved for a while: nodes join one after the other at the start.

    Raises ``TimeoutError``.
    """
    since_s, pids = time.monotonic(), set[int]()

    def is_quiet(told: ClusterStatus) -> bool:
        nonlocal since_s, pids
        now = {actor.pid for actor in told.actors}
        if now != pids or not _is_whole(told):
            since_s, pids = time.monotonic(), now
        return time.monotonic() - since_s > QUIET_S

    _wait(client, is_quiet, "all actors are where they stay")


class Watch:
    """The processes of a cluster over time: those that ended, and those that a fault had hit."""

    def __init__(self, client: Client) -> None:
        """Look at the status again and again, on a thread of its own."""
        self._client = client
        self._seen: dict[int, str] = {}
        self.hit: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self, dead: set[int]) -> list[str]:
        """Return the processes that ended, though no fault hit them and they are not ``dead``."""
        self._ended.set()
        self._thread.join(LIMIT_S)
        gone = {pid: name for pid, name in self._seen.items() if not Path(f"/proc/{pid}").exists()}
        return [f"{name} {pid}" for pid, name in gone.items() if pid not in self.hit | dead]

    def _look(self) -> None:
        while not self._ended.wait(POLL_S):
            with suppress(ExpertMeshError):
                told = self._client.status()
                self._seen |= {actor.pid: actor.actor_id for actor in told.actors}
                self._seen |= {router.pid: "router" for router in told.routers}
                self._seen |= {gateway.pid: "gateway" for gateway in told.gateways}
                self._seen[told.controller_pid] = "controller"


@dataclass(frozen=True, slots=True)
class Poison:
    """Two prompts of a model: at one the routers end that compute it, at the other the actors.

    ``deaths`` gets a line for each process that ended.
    """

    model: str
    router_prompt: Sequence[int]
    actor_prompt: Sequence[int]
    deaths: Path


class GrayFaults:
    """Carries out the faults, one after the other."""

    def __init__(
        self,
        client: Client,
        metrics_url: str,
        network: Network,
        nodes: tuple[Sequence[int], Sequence[int]],
        watch: Watch,
        poison: Poison,
    ) -> None:
        """``nodes`` are the numbers of the routers' and of the actors' nodes; the head is 0.

        ``client`` does not ask again by itself: it meets the poison's error.
        """
        self._client, self._metrics_url, self._network, self._watch = (
            client, metrics_url, network, watch,
        )  # fmt: skip
        self._router_nodes, self._expert_nodes = nodes
        self._poison = poison
        self._asked_again_from_s = 0.0
        """When no router avoids actors any longer since it was cut off from them."""

    def inject(self, fault: Gray, choice: int) -> str:
        """Carry out a fault on the ``choice``-th victim; returns a word on what it hit.

        Raises ``AssertionError`` where it was not seen to hit, ``TimeoutError`` where the cluster
        is not whole before or after it.
        """
        told = self._whole()
        words = {
            Gray.BROKEN: lambda: self._broken(told.actors[choice % len(told.actors)]),
            Gray.SLOW: lambda: self._slow(told.actors[choice % len(told.actors)]),
            Gray.POISON_REQUEST: lambda: self._poisoned(self._poison.router_prompt, "router"),
            Gray.POISON_FRAME: lambda: self._poisoned(self._poison.actor_prompt, "actor"),
            Gray.CUT_CONTROLLER: self._cut_controller,
            Gray.CUT_ROUTER: lambda: self._cut_router(told, choice),
        }[fault]()
        self._whole()
        return words

    def dead_by_poison(self) -> set[int]:
        """Return the pids of the processes that ended by poison."""
        return {int(line.split()[1]) for line in self._poison.deaths.read_text().splitlines()}

    def _broken(self, actor: ActorStatus) -> str:
        self._watch.hit.add(actor.pid)
        with _file("broken", actor.pid) as hit:
            _wait(
                self._client,
                lambda told: actor.pid not in {a.pid for a in told.actors},
                "a successor",
            )
            assert hit.exists(), f"{actor.actor_id} computed nothing while it was broken"
        return actor.actor_id

    def _slow(self, actor: ActorStatus) -> str:
        with _file("slow", actor.pid) as hit:
            threading.Event().wait(SLOW_S)
            assert hit.exists(), f"{actor.actor_id} computed nothing while it was slow"
        return actor.actor_id

    def _poisoned(self, prompt: Sequence[int], victim: str) -> str:
        before = self._poison.deaths.read_text().splitlines()
        sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
        ask = self._client.generate
        error: ExpertMeshError | None = None
        try:
            ask(list(prompt), sampling, model=self._poison.model, timeout_s=POISON_TIMEOUT_S)
        except ExpertMeshError as caught:
            error = caught
        died = self._poison.deaths.read_text().splitlines()[len(before) :]
        assert died, f"the poison ended no {victim}"
        assert all(line.startswith(victim) for line in died), died
        assert error is not None, "the poison was answered"
        return f"{len(died)} died, then {error.code.value}: {error}"

    def _cut_controller(self) -> str:
        for node in self._expert_nodes:
            self._network.cut(0, node)
        threading.Event().wait(CUT_CONTROLLER_S)
        told = self._client.status()
        for node in self._expert_nodes:
            self._network.heal(0, node)
        silent = sum(bool(actor.silence) for actor in told.actors)
        assert silent == len(told.actors), f"the controller still heard {told.actors}"
        _wait(
            self._client,
            lambda told: not any(a.silence for a in told.actors),
            "all actors are heard",
        )
        return f"{silent} actors silent"

    def _cut_router(self, told: ClusterStatus, choice: int) -> str:
        threading.Event().wait(max(0.0, self._asked_again_from_s - time.monotonic()))
        routers = self._with_any(self._router_nodes, [router.pid for router in told.routers])
        nodes = self._with_any(self._expert_nodes, [actor.pid for actor in told.actors])
        router = routers[choice % len(routers)]
        experts = nodes[choice // 2 % len(nodes)]
        before = self._asked_again()  # by router: one that has died takes its counters along
        self._network.cut(router, experts)
        threading.Event().wait(CUT_ROUTER_S)
        again = self._again_since(before)  # a router that has just begun has few requests
        self._network.heal(router, experts)
        self._asked_again_from_s = time.monotonic() + AVOID_S
        assert again > 0, "no router asked another copy"
        return f"node {router} from node {experts}, {again:.0f} calls asked again"

    def _with_any(self, nodes: Sequence[int], pids: Sequence[int]) -> list[int]:
        """Return the nodes that have any of the processes: after a fault one may have none."""
        place = {namespace_of(pid) for pid in pids}
        return [node for node in nodes if self._network.namespace(node) in place]

    def _again_since(self, before: Mapping[str, float]) -> float:
        """Return the calls that were asked again since, once there are any or a time is over."""
        deadline_s = time.monotonic() + CUT_AT_MOST_S
        while True:
            after = self._asked_again()
            again = sum(max(0.0, after[name] - before.get(name, 0.0)) for name in after)
            if again > 0 or time.monotonic() > deadline_s:
                return again
            threading.Event().wait(POLL_S)

    def _asked_again(self) -> dict[str, float]:
        lines = httpx.get(self._metrics_url, timeout=LIMIT_S).text.splitlines()
        name = "expertmesh_dispatch_retries_total{"
        counters = (line.rpartition(" ") for line in lines if line.startswith(name))
        return {series: float(value) for series, _, value in counters}

    def _whole(self) -> ClusterStatus:
        return _wait(self._client, _is_whole, "every expert has its copies")


def _is_whole(told: ClusterStatus) -> bool:
    alive = [router for router in told.routers if Path(f"/proc/{router.pid}").exists()]
    return told.live_copies >= told.min_copies and len(alive) == len(told.routers) == ROUTERS


def _wait(client: Client, condition: Callable[[ClusterStatus], bool], what: str) -> ClusterStatus:
    pause, deadline_s = threading.Event(), time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        with suppress(ExpertMeshError):
            told = client.status()
            if condition(told):
                return told
        pause.wait(POLL_S)
    raise TimeoutError(f"{what}: not within {LIMIT_S} s")


@contextmanager
def _file(what: str, pid: int) -> Iterator[Path]:
    """Have an actor's process fail or be slow; yields the file that tells whether it was."""
    folder = Path(os.environ[FOLDER])
    file, hit = folder / f"{what}-{pid}", folder / f"hit-{pid}"
    hit.unlink(missing_ok=True)
    file.touch()
    try:
        yield hit
    finally:
        file.unlink()
