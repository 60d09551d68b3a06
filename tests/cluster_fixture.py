"""One ExpertMesh on a local Ray for all integration and fault tests, and how they use it.

The cluster is whole (every expert live, a router per model) before each test; the tests that break
something wait until it is whole again. Nothing here sleeps: every wait is for a condition, bounded.
"""

from __future__ import annotations

import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from transformers import MixtralForCausalLM

from benchmarks.shipped import free_ports, serve_options, with_ports
from cluster.errors import ExpertMeshError
from cluster.reports import ActorStatus, ClusterStatus
from router.client import Client, Reply, Sampling
from tests.checkpoints import VOCAB_SIZE, transformers_tokens
from tests.quantise import MIXTRAL, make
from tests.span_keeper import FOLDER_VARIABLE

APP, TINY, RANDOM = "expertmesh", "mesh-tiny", "random"
NUM_ACTORS = 3
LAYERS, NUM_EXPERTS, TOP_K = {TINY: 4, RANDOM: 3}, 8, 2
RANDOM_CONTEXT = 256
WHOLE_TIMEOUT_S = 60.0
POLL_S = 0.05
TRACING = {
    "enabled": True,
    "exporter_import_path": "tests.span_keeper:to_files",
    "sampling_ratio": 0.0,  # only what a client asks for
}
DEVICES, DEVICE_SHARE = 8, 0.25
"""Emulated devices of a cluster, and the share of one that a router or an actor asks for."""
SETTLED_S = 1.5
"""Longer than from one heartbeat of an actor to the next."""
TLS = ssl.create_default_context()
"""What httpx would make for each request, even one without TLS: it reads all authorities."""

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = WHOLE_TIMEOUT_S) -> T:
    """Return the first true value of ``condition``; fails the test after ``timeout_s``.

    An error of ours means "not yet": parts of the cluster may be away for a while.
    """
    pause = threading.Event()
    deadline_s = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline_s:
        try:
            value = condition()
        except (ExpertMeshError, httpx.TransportError) as error:
            last = error
        else:
            if value:
                return value
            last = value
        pause.wait(POLL_S)
    pytest.fail(f"{what}: not within {timeout_s} s (last: {last!r})")


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def prompt_of(length: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Return random token ids without the special ones."""
    source = random.Random(seed)
    return [source.randrange(2, vocab_size) for _ in range(length)]


def greedy(max_tokens: int, **others: Any) -> Sampling:
    """Return greedy sampling of exactly ``max_tokens`` tokens."""
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **others)


class StreamReader:
    """Reads one stream on a thread of its own; keeps the pieces, or the error that ended it."""

    def __init__(
        self,
        client: Client,
        prompt: str | Sequence[int],
        sampling: Sampling,
        model: str = "random",
        timeout_s: float = 60.0,
        on_expert_loss: str | None = None,
    ) -> None:
        self.pieces: list[Reply] = []
        self.error: Exception | None = None
        self.took_s = 0.0
        self.arrived_s: list[float] = []
        """When each piece came, by the monotonic clock."""
        self._changed = threading.Condition()
        self._ended = False
        self._args = (client, prompt, sampling, model, timeout_s, on_expert_loss)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        client, prompt, sampling, model, timeout_s, on_expert_loss = self._args
        started_s = time.monotonic()
        try:
            pieces = client.stream(
                prompt, sampling, model=model, timeout_s=timeout_s, on_expert_loss=on_expert_loss
            )
            for piece in pieces:
                with self._changed:
                    self.pieces.append(piece)
                    self.arrived_s.append(time.monotonic())
                    self._changed.notify_all()
        except Exception as error:  # handed to the test's thread
            self.error = error
        with self._changed:
            self.took_s = time.monotonic() - started_s
            self._ended = True
            self._changed.notify_all()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far, of all choices."""
        return tuple(token_id for piece in self.pieces for token_id in piece.token_ids)

    @property
    def ended(self) -> bool:
        """Whether the stream is over, well or not."""
        return self._ended

    def wait_tokens(self, count: int, timeout_s: float = 30.0) -> None:
        """Wait until so many tokens have come; the stream must still go on then."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._ended or len(self.token_ids) >= count, timeout_s
            )
            assert came, f"only {len(self.token_ids)} tokens in {timeout_s} s"
            assert not self._ended, f"the stream ended before the fault: {self.error!r}"

    def wait_change(self, timeout_s: float) -> None:
        """Wait until another piece has come or the stream is over, at most so long."""
        with self._changed:
            self._changed.wait(timeout_s)

    def wait_end(self, timeout_s: float = 60.0) -> None:
        """Wait until the stream is over."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended, timeout_s), (
                f"still {len(self.token_ids)} tokens after {timeout_s} s"
            )

    def result(self, timeout_s: float = 60.0) -> tuple[int, ...]:
        """Return all tokens of a stream that ended well, as the last piece says it did."""
        self.wait_end(timeout_s)
        if self.error is not None:
            raise self.error
        assert [piece.finish_reason for piece in self.pieces[:-1]] == [None] * (
            len(self.pieces) - 1
        )
        usage = self.pieces[-1].usage
        assert usage is not None
        assert usage.completion_tokens == len(self.token_ids)
        return self.token_ids


@dataclass(frozen=True)
class ServedCluster:
    """A running ExpertMesh: where it answers, and the checkpoint that no other has.

    That one's weights are stored in FP8; ``oracle`` is transformers' model of what they stand for.
    """

    http_url: str
    grpc_address: str
    args: dict[str, Any]
    random_folder: Path
    spans_folder: Path
    oracle: MixtralForCausalLM
    client: Client
    changed: threading.Event = field(default_factory=threading.Event)
    """Set by a test that leaves something else deployed than ``args`` says."""
    _expected: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = field(default_factory=dict)

    def expected(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """Return the random model's greedy tokens as transformers has them; remembered."""
        key = (tuple(prompt), count)
        if key not in self._expected:
            self._expected[key] = transformers_tokens(self.oracle, prompt, count)
        return self._expected[key]

    def restore(self) -> None:
        """Deploy ``args`` again where a test has left something else.

        Only the next test that needs them pays for this: mixtures deploy them themselves.
        """
        if self.changed.is_set():
            from ray import serve

            # Actors go too: for some mixtures they have imported what other experts do not need.
            serve.delete(APP)
            deploy(self.args)
            self.changed.clear()

    def status(self) -> ClusterStatus:
        """Ask the controller."""
        return self.client.status()

    def actors(self) -> dict[str, ActorStatus]:
        """Return the live actors by id."""
        return {actor.actor_id: actor for actor in self.status().actors}

    def pids(self) -> dict[str, tuple[int, ...]]:
        """Return the pids of all parts."""
        told = self.status()
        return {
            "controller": (told.controller_pid,),
            "routers": tuple(sorted(one.pid for one in told.routers)),
            "gateways": tuple(sorted(one.pid for one in told.gateways)),
            "actors": tuple(actor.pid for actor in told.actors),
        }

    def whole(self) -> ClusterStatus | None:
        """Return the status if every part is there and every process that it names lives."""
        told = self.status()
        pids = [pid for group in self.pids().values() for pid in group]
        is_whole = (
            told.live_copies >= told.min_copies
            and len(told.actors) == self.args["experts"]["actors"]
            and len(told.routers) == len(told.models) * self.args["router"]["replicas"]
            and len(told.gateways) == 1
            and all(is_alive(pid) for pid in pids)
            and httpx.get(f"{self.http_url}/ready", verify=TLS).status_code == 200
        )
        return told if is_whole else None

    def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> ClusterStatus:
        """Wait until every part is there."""
        return wait_until(self.whole, "the cluster is whole", timeout_s)

    def crowd(
        self, model: str, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> list[tuple[int, ...]]:
        """Send all prompts at once; returns each one's tokens."""

        def one(prompt: Sequence[int], sampling: Sampling) -> tuple[int, ...]:
            [reply] = self.client.generate(prompt, sampling, model=model, timeout_s=60)
            return reply.token_ids

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts, samplings))

    def metric(self, name: str) -> dict[str, float]:
        """Return the samples of one metric by their labels."""
        text = httpx.get(f"{self.http_url}/metrics", verify=TLS).text
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def running(self) -> float:
        """Return how many requests the gateway has accepted and not ended."""
        return sum(self.metric("expertmesh_requests_in_flight").values())

    def settled_tokens(self) -> int:
        """Return how many rows all actors have computed, once no more are told for a while."""
        last, since_s = -1, 0.0

        def settled() -> bool:
            nonlocal last, since_s
            total = sum(actor.tokens for actor in self.status().actors)
            if total != last:
                last, since_s = total, time.monotonic()
            return time.monotonic() - since_s > SETTLED_S

        wait_until(settled, "the actors have nothing to do", 20)
        return last


@dataclass(frozen=True)
class Shape:
    """What a cluster is made of: copies of each expert, and where it computes.

    ``on_device`` puts routers and actors on emulated devices (:mod:`tests.emulated_device`).
    """

    min_copies: int = 1
    on_device: bool = False

    def ray_options(self) -> dict[str, Any]:
        """Return Ray's options for the processes of this cluster, and of others beside it."""
        if not self.on_device:
            return {"num_cpus": 8}
        hook = "tests.emulated_device.emulate_process"
        # The hook runs before Ray has told a process where its driver finds modules.
        variables = {"PYTHONPATH": str(Path(__file__).parents[1])}
        environment = {"worker_process_setup_hook": hook, "env_vars": variables}
        return {"num_cpus": 32, "num_gpus": DEVICES, "runtime_env": environment}

    def num_gpus(self) -> dict[str, float]:
        """Return what each router or actor asks for."""
        return {"num_gpus": DEVICE_SHARE} if self.on_device else {}


def deploy(args: dict[str, Any]) -> None:
    """Deploy the application with these arguments; returns once Serve says that it runs."""
    from ray import serve

    from router.app import build

    serve.run(build(args), name=APP, route_prefix="/")


@contextmanager
def _running_ray(variables: Mapping[str, str], options: Mapping[str, Any]) -> Iterator[None]:
    """Start Ray on this machine, whose processes have these variables; ends it."""
    import ray

    os.environ.update(variables)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            namespace="serve",
            **options,
        )
        yield
    finally:
        ray.shutdown()
        for name in variables:
            del os.environ[name]


@contextmanager
def served_cluster(folder: Path, shape: Shape) -> Iterator[ServedCluster]:
    """Start Ray, Serve and the application; ends all of them."""
    from ray import serve

    # Quantised, so that whatever is tested of a deployment holds for it; the other model is not.
    made = make(MIXTRAL, folder)
    spans_folder = folder.with_name(f"{folder.name}-spans")
    spans_folder.mkdir()
    http_port, grpc_port = free_ports(2)
    args: dict[str, Any] = {
        "models": [
            {"id": TINY, "path": "models/mesh-tiny"},
            {"id": RANDOM, "path": str(made.folder)},
        ],
        "experts": {
            "actors": NUM_ACTORS,
            "min_copies": shape.min_copies,
            **shape.num_gpus(),
        },
        "router": {"replicas": 1, **shape.num_gpus()},
    }
    args = with_ports(args, http_port, grpc_port)
    with _running_ray({FOLDER_VARIABLE: str(spans_folder)}, shape.ray_options()):
        serve.start(**serve_options(), tracing_config=TRACING)
        deploy(args)
        address = f"127.0.0.1:{grpc_port}"
        http_url = f"http://127.0.0.1:{http_port}"
        # Without retries, so that a test sees what the server lets through.
        with Client(address, retry=None) as client:
            cluster = ServedCluster(
                http_url, address, args, made.folder, spans_folder, made.oracle, client
            )
            cluster.wait_whole()
            yield cluster
        serve.shutdown()
