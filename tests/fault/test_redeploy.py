"""Other weights are deployed under the same id while requests run: no token is of both models."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from cluster.errors import ExpertMeshError
from router.app import build
from tests.cluster_fixture import (
    APP,
    RANDOM,
    ServedCluster,
    StreamReader,
    greedy,
    transformers_tokens,
    wait_until,
)
from tests.fault import faults
from tests.fault.faults import LENGTH, SHARED, SHARED_PROMPTS
from tests.quantise import MIXTRAL, Quantised, make

STREAMS, SHORT_WORKERS = 2, 2
LONG, SHORT = 150, 6
PROMPTS = faults.PROMPTS[:4]
ASKED = [*PROMPTS, *SHARED_PROMPTS]
"""What short requests ask: some share a beginning, so none may have the other model's keys."""
BACK_S = 300.0
READY_S = 90.0
"""How soon after its actors are ready the new model must answer."""


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """Another checkpoint of the same shape."""
    return make(MIXTRAL, tmp_path_factory.mktemp("other"), seed=5)


class ShortRequests:
    """Short requests one after another, each answer wholly of one of the two models."""

    def __init__(
        self, served: ServedCluster, answers: Sequence[dict[tuple[int, ...], str]]
    ) -> None:
        self.kept: dict[str, int] = {"old": 0, "new": 0}
        """The most tokens of a prompt that a router of each model had kept."""
        self.named: list[tuple[float, str]] = []
        """The model of each answer, and when it came."""
        self.failures: list[ExpertMeshError] = []
        self.wrong: list[tuple[int, ...]] = []
        self._served, self._answers = served, answers
        self._ended = threading.Event()

    def ask(self, worker: int) -> None:
        for number in itertools.count(worker):
            if self._ended.is_set():
                return
            place = number % len(ASKED)
            try:
                [reply] = self._served.client.generate(
                    ASKED[place], greedy(SHORT), model=RANDOM, timeout_s=60
                )
            except ExpertMeshError as error:
                self.failures.append(error)
                self._ended.wait(0.2)
                continue
            name = self._answers[place].get(reply.token_ids)
            if name is None:
                self.wrong.append(reply.token_ids)
            else:
                self.named.append((time.monotonic(), name))
                self.kept[name] = max(self.kept[name], reply.usage.cached_tokens)

    def count(self, name: str) -> int:
        return sum(named == name for _, named in self.named)

    def end(self) -> None:
        self._ended.set()


@contextmanager
def asking(served: ServedCluster, old: Any, new: Any) -> Iterator[ShortRequests]:
    answers = [
        {
            transformers_tokens(old, prompt, SHORT): "old",
            transformers_tokens(new, prompt, SHORT): "new",
        }
        for prompt in ASKED
    ]
    assert all(len(answer) == 2 for answer in answers)
    requests = ShortRequests(served, answers)
    with ThreadPoolExecutor(SHORT_WORKERS) as pool:
        workers = [pool.submit(requests.ask, worker) for worker in range(SHORT_WORKERS)]
        try:
            yield requests
        finally:
            requests.end()
    for worker in workers:
        worker.result()


def deploy(served: ServedCluster, folder: Path, **experts: object) -> Future[Any]:
    """Deploy the same application with other weights, in the background."""
    tiny, random = served.args["models"]
    changed = {
        **served.args,
        "models": [tiny, {**random, "path": str(folder)}],
        "experts": {**served.args["experts"], **experts},
    }
    pool = ThreadPoolExecutor(1)
    deployed = pool.submit(serve.run, build(changed), name=APP, route_prefix="/")
    pool.shutdown(wait=False)
    return deployed


def of_the_new_model(requests: ShortRequests, count: int) -> None:
    wanted = requests.count("new") + count
    wait_until(lambda: requests.count("new") >= wanted, "the new model answers", BACK_S)


def both_loaded_s(served: ServedCluster, weight_bytes: int) -> float:
    """Return when the actors held more than ``weight_bytes``, the same for a while: both models."""
    held: list[int] = []

    def is_loaded() -> bool:
        held.append(sum(actor.weight_bytes for actor in served.status().actors))
        return held[-1] > weight_bytes and held[-10:].count(held[-1]) == 10

    wait_until(is_loaded, "both models are loaded", BACK_S)
    return time.monotonic()


@dataclass(frozen=True)
class Ended:
    """A stream that is over: its prompt's place, its tokens, its error, and its times."""

    place: int
    token_ids: tuple[int, ...]
    error: Exception | None
    started_s: float
    ended_s: float


@dataclass
class Streams:
    """Streams of each worker one after another, until told to end."""

    served: ServedCluster
    ended: threading.Event = field(default_factory=threading.Event)
    came: list[Ended] = field(default_factory=list)

    def read(self, worker: int) -> None:
        for number in itertools.count(worker):
            if self.ended.is_set():
                return
            place, started_s = number % len(PROMPTS), time.monotonic()
            stream = StreamReader(self.served.client, PROMPTS[place], greedy(LONG), RANDOM, BACK_S)
            stream.wait_end(BACK_S)
            ended_s = time.monotonic()
            self.came.append(Ended(place, stream.token_ids, stream.error, started_s, ended_s))


def test_with_memory_for_both_no_request_fails_and_none_is_mixed(
    served: ServedCluster, other_weights: Quantised
) -> None:
    before = served.status()
    old = [served.expected(prompt, LENGTH)[:LONG] for prompt in PROMPTS]
    new = [transformers_tokens(other_weights.oracle, prompt, LONG) for prompt in PROMPTS]
    weights = sum(actor.weight_bytes for actor in before.actors)
    streams = Streams(served)
    with (
        asking(served, served.oracle, other_weights.oracle) as requests,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        readers = [pool.submit(streams.read, worker) for worker in range(STREAMS)]
        try:
            served.changed.set()
            deployed = deploy(served, other_weights.folder)
            ready_s = both_loaded_s(served, weights)
            of_the_new_model(requests, 20)
            deployed.result(BACK_S)
        finally:
            streams.ended.set()
        for reader in readers:
            reader.result()
    assert requests.failures == []
    assert requests.wrong == []
    assert requests.count("old") > 0
    # Pages of both models were found, and transformers, which keeps none, has the same tokens.
    assert requests.kept == {"old": len(SHARED), "new": len(SHARED)}
    first_s = min(at_s for at_s, name in requests.named if name == "new")
    print(f"the new model answered {first_s - ready_s:.1f} s after its experts were there")
    assert first_s - ready_s < READY_S
    named = [name for _, name in sorted(requests.named)]
    print(f"{named.count('old')} short answers of the old model, {named.count('new')} of the new")
    assert [stream.error for stream in streams.came if stream.error is not None] == []
    assert all(s.token_ids in (old[s.place], new[s.place]) for s in streams.came)
    of_old = [s for s in streams.came if s.token_ids == old[s.place]]
    both = [s for s in of_old if s.started_s < ready_s < s.ended_s]
    print(f"{len(of_old)} of {len(streams.came)} streams are the old model's")
    print(f"{len(both)} of them began before the actors held both models, and ended after it")
    assert both
    assert len(of_old) < len(streams.came)
    after = served.wait_whole(BACK_S)
    assert {a.pid for a in before.actors} == {a.pid for a in after.actors}  # nothing restarted

    def is_released() -> bool:
        return sum(actor.weight_bytes for actor in served.status().actors) == weights

    # Once the routers of the old model have ended.
    wait_until(is_released, "the old model's experts leave the memory", BACK_S)
