"""Both transports keep one contract, and a model's tokens do not depend on which is used."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import psutil
import pytest
import ray
from ray import serve
from ray.experimental import get_object_locations

from cluster.controller.records.pool import CONTROL_CALLS, actor_options
from cluster.environment import router_environment
from cluster.spec import ACTOR_NAMESPACE, ActorSpec, TransportKind, actor_name, model_id_of
from cluster.transport.base import Call, CallFailure, Outcome, Transport
from cluster.transport.open import open_transport
from tests.cluster_fixture import APP as SERVED_APP
from tests.cluster_fixture import RANDOM, VOCAB_SIZE, ServedCluster, is_alive, prompt_of, wait_until
from tests.echo_actor import Echo
from tests.local_cluster import LocalCluster, greedy_request, within

APP = "contract"
KINDS: tuple[TransportKind, ...] = ("ray", "stream", "auto")
LIMIT_S = 60.0
START_S = 100.0
"""A process of Ray imports torch: half a minute on one core with others."""
HURRIED_S = 2.0
DIED_S = 30.0
"""In which a death is known, on a machine that has other work too; a hung call takes longer."""
NUMBERS = itertools.count()


class Actors:
    """Echo actors by id; each test has its own."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self._handles: list[Any] = []
        self._remote = ray.remote(concurrency_groups={"control": CONTROL_CALLS})(Echo)

    def add(self, name: str, generation: int = 1) -> str:
        options = {"name": actor_name(APP, name, generation), "namespace": ACTOR_NAMESPACE}
        handle = self._remote.options(num_cpus=0, max_concurrency=8, **options).remote()
        self._handles.append(handle)
        self.pids[name] = ray.get(handle.pid.remote(), timeout=START_S)
        return name

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.pids[name], number)

    def close(self) -> None:
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for handle in self._handles:
            ray.kill(handle)


@pytest.fixture
def actors(served: ServedCluster) -> Iterator[Actors]:
    actors = Actors()
    yield actors
    actors.close()


@pytest.fixture
def mortal(actors: Actors) -> list[str]:
    """Two actors of the test's own."""
    return [actors.add(f"mortal-{next(NUMBERS)}") for _ in range(2)]


@pytest.fixture(scope="module")
def names(served_session: ServedCluster) -> Iterator[list[str]]:
    """Two actors that all tests share, and leave alive."""
    actors = Actors()
    yield [actors.add(f"echo-{i}") for i in range(2)]
    actors.close()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> TransportKind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def transport(kind: TransportKind) -> Iterator[Transport]:
    transport = open_transport(APP, kind)
    yield transport
    transport.close()


def call(name: str, frame: bytes, generation: int = 1) -> Call:
    return Call(name, generation, (frame[:5], frame[5:]), LIMIT_S)


def answers(outcomes: Sequence[Outcome]) -> list[bytes | CallFailure]:
    return [o if isinstance(o, CallFailure) else bytes(o) for o in outcomes]


def ask(
    transport: Transport, *calls: Call, timeout_s: float = LIMIT_S
) -> list[bytes | CallFailure]:
    return answers(transport.send(within(timeout_s, calls)).wait())


def settle(transport: Transport, kind: TransportKind, names: Sequence[str]) -> None:
    """Call the actors until the calls go over what the transport is named after."""
    wanted = "ray" if kind == "ray" else "stream"

    def settled() -> bool:
        before = transport.calls[wanted]
        came = ask(transport, *(call(name, b"hello") for name in names))
        assert came == [b"olleh"] * len(names)
        return transport.calls[wanted] - before == len(names)

    wait_until(settled, f"calls go over {wanted}", LIMIT_S)


@pytest.mark.parametrize("size", [1, 1000, 99_999, 1_000_000, 6_000_000])
def test_frames_of_any_size_are_answered(
    transport: Transport, kind: TransportKind, names: list[str], size: int
) -> None:
    settle(transport, kind, names)
    frames = [secrets.token_bytes(size) for _ in names]
    came = ask(transport, *map(call, names, frames))
    assert came == [frame[::-1] for frame in frames]


def test_no_calls_have_no_outcomes(transport: Transport) -> None:
    assert ask(transport) == []


def test_an_actor_that_is_gone_is_waited_for_no_longer(
    transport: Transport, kind: TransportKind, mortal: list[str]
) -> None:
    settle(transport, kind, mortal)
    hung, well = mortal
    pending = transport.send(within(LIMIT_S, [call(hung, b"wait 45"), call(well, b"hello")]))
    started_s = time.monotonic()
    outcomes = pending.wait(lambda one, silent_s: one.actor_id == hung)
    assert answers(outcomes) == [CallFailure.DIED, b"olleh"]
    assert time.monotonic() - started_s < DIED_S


def test_outcomes_are_in_the_order_of_the_calls(
    transport: Transport, kind: TransportKind, names: list[str]
) -> None:
    settle(transport, kind, names)
    for first, second in (names, names[::-1]):
        assert ask(transport, call(first, b"wait 0.1"), call(second, b"abc")) == [
            b"1.0 tiaw",
            b"cba",
        ]


def test_flights_overlap(transport: Transport, kind: TransportKind, names: list[str]) -> None:
    settle(transport, kind, names)
    frames = [[secrets.token_bytes(40_000) for _ in names] for _ in range(4)]
    pending_calls = [transport.send(within(LIMIT_S, [*map(call, names, one)])) for one in frames]
    for place in (2, 0, 3, 1):
        expected = [frame[::-1] for frame in frames[place]]
        assert answers(pending_calls[place].wait()) == expected


def test_an_actor_that_never_was_has_died_and_others_are_not_disturbed(
    transport: Transport, kind: TransportKind, names: list[str]
) -> None:
    settle(transport, kind, names)
    calls = [call("nobody", b"x"), call(names[0], b"abc"), call(names[1], b"abc", generation=7)]
    came = ask(transport, *calls, timeout_s=5.0)
    assert came == [CallFailure.DIED, b"cba", CallFailure.DIED]


def test_a_slow_answer_times_out_and_is_never_taken_for_another(
    transport: Transport, kind: TransportKind, names: list[str]
) -> None:
    settle(transport, kind, names)
    started_s = time.monotonic()
    slow, quick = call(names[0], b"wait 5"), call(names[1], b"abc")
    assert ask(transport, slow, quick, timeout_s=HURRIED_S) == [CallFailure.TIMED_OUT, b"cba"]
    assert time.monotonic() - started_s < 4.5
    for number in range(20):
        assert ask(transport, call(names[0], b"%d" % number)) == [(b"%d" % number)[::-1]]


@pytest.mark.parametrize("busy", [False, True], ids=["between two frames", "while it computes"])
def test_a_killed_actor_has_died_at_once(
    transport: Transport, kind: TransportKind, actors: Actors, mortal: list[str], busy: bool
) -> None:
    settle(transport, kind, mortal)
    frame = b"wait 45" if busy else b"abc"
    if busy:
        threading.Timer(0.3, actors.signal, (mortal[0], signal.SIGKILL)).start()
    else:
        actors.signal(mortal[0], signal.SIGKILL)
        wait_until(lambda: not is_alive(actors.pids[mortal[0]]), "the actor is dead", LIMIT_S)
    started_s = time.monotonic()
    came = ask(transport, call(mortal[0], frame), call(mortal[1], b"abc"))
    assert came == [CallFailure.DIED, b"cba"]
    assert time.monotonic() - started_s < DIED_S
    # Its connections end a moment before the process does.
    wait_until(lambda: not is_alive(actors.pids[mortal[0]]), "the actor is dead", LIMIT_S)


def test_a_stopped_actor_times_out_and_answers_again_when_it_goes_on(
    transport: Transport, kind: TransportKind, actors: Actors, mortal: list[str]
) -> None:
    settle(transport, kind, mortal)
    actors.signal(mortal[0], signal.SIGSTOP)
    stopped = psutil.Process(actors.pids[mortal[0]])
    wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, "the actor stands still", LIMIT_S)
    for _ in range(12):  # more than a stream's window
        calls = [call(mortal[0], b"lost"), call(mortal[1], b"abc")]
        # A busy machine may need more time for the other's answer.
        answers = (ask(transport, *calls, timeout_s=limit_s) for limit_s in (0.1, 1.0, 10.0))
        assert [CallFailure.TIMED_OUT, b"cba"] in answers
    actors.signal(mortal[0], signal.SIGCONT)
    wait_until(
        lambda: ask(transport, call(mortal[0], b"back")) == [b"kcab"], "it answers again", LIMIT_S
    )
    assert ask(transport, call(mortal[0], b"again")) == [b"niaga"]


def test_the_next_generation_is_reached(
    transport: Transport, kind: TransportKind, actors: Actors, mortal: list[str]
) -> None:
    settle(transport, kind, mortal)
    actors.signal(mortal[0], signal.SIGKILL)
    actors.add(mortal[0], generation=2)
    wait_until(
        lambda: ask(transport, call(mortal[0], b"new", generation=2)) == [b"wen"],
        "the new one answers",
        LIMIT_S,
    )
    assert ask(transport, call(mortal[0], b"old"), timeout_s=1.0) == [CallFailure.DIED]


def test_two_routers_share_actors(kind: TransportKind, names: list[str]) -> None:
    failures: list[BaseException] = []

    def router(seed: int) -> None:
        transport = open_transport(APP, kind)
        try:
            for number in range(100):
                frame = b"%d of %d" % (number, seed)
                expected = [frame[::-1]] * len(names)
                assert ask(transport, *(call(name, frame) for name in names)) == expected
        except BaseException as error:
            failures.append(error)
        finally:
            transport.close()

    threads = [threading.Thread(target=router, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


@pytest.fixture
def open_engine(served: ServedCluster) -> Iterator[Callable[[TransportKind], LocalCluster]]:
    """Run an engine of the test's own over the served cluster's actors."""
    clusters: list[LocalCluster] = []
    transports: list[Transport] = []

    def opened(kind: TransportKind) -> LocalCluster:
        controller = serve.get_deployment_handle("Controller", app_name=SERVED_APP)
        told = controller.watch.remote("test", 0, "", (-1, -1), 5.0).result(timeout_s=LIMIT_S)
        transports.append(open_transport(SERVED_APP, kind))
        [key] = [m for m in told["placement"].models() if model_id_of(m) == RANDOM]
        elsewhere = (key, transports[-1], told["placement"])
        clusters.append(LocalCluster(served.random_folder, elsewhere=elsewhere))
        return clusters[-1]

    yield opened
    for cluster in clusters:
        cluster.close()
    for transport in transports:
        transport.close()


def test_tokens_do_not_depend_on_the_transport(
    served: ServedCluster,
    kind: TransportKind,
    open_engine: Callable[[TransportKind], LocalCluster],
) -> None:
    cluster = open_engine(kind)
    prompts = [prompt_of(5 + 7 * i, i, VOCAB_SIZE) for i in range(8)]
    requests = [greedy_request(str(i), prompt, 12) for i, prompt in enumerate(prompts)]
    for request in requests:
        request = greedy_request(f"{request.request_id} alone", request.prompt_token_ids, 12)
        object.__setattr__(request, "model", RANDOM)
        [[event]] = cluster.generate(request)
        assert event.token_ids == served.expected(request.prompt_token_ids, 12)
    for request, [event] in zip(requests, cluster.generate(*requests), strict=True):
        assert event.token_ids == served.expected(request.prompt_token_ids, 12)
    calls = cluster.dispatcher._transport.calls
    assert calls["ray" if kind == "ray" else "stream"] > 0
    assert kind == "auto" or len(calls) == 1


class _Asked:
    def rows(self, size_bytes: int) -> bytes:
        return bytes(size_bytes)

    def stored(self, asked: Any, sizes_bytes: Sequence[int]) -> list[bool]:
        """Tell which of another actor's answers lie in an object store; the last one does.

        An owner is told a moment after it has the answer: of all before it knows of the last.
        """
        refs = [asked.rows.remote(size) for size in sizes_bytes]
        ray.wait(refs, num_returns=len(refs), timeout=LIMIT_S, fetch_local=False)
        wait_until(lambda: _is_stored(refs[-1]), "the last is known to be stored", LIMIT_S)
        return [_is_stored(ref) for ref in refs]


def _is_stored(ref: Any) -> bool:
    return bool(get_object_locations([ref])[ref]["node_ids"])


def test_a_steps_rows_of_a_large_model_make_no_way_through_the_object_store(
    served: ServedCluster,
) -> None:
    actors = ray.remote(_Asked)
    spec = ActorSpec(APP, (), 0.0, 0, 1, 1)
    as_actor = actor_options(spec, "unused")["runtime_env"]
    as_router = {"env_vars": router_environment(1)}
    expert = actors.options(num_cpus=0, runtime_env=as_actor).remote()
    router = actors.options(num_cpus=0, runtime_env=as_router).remote()
    try:
        sizes = [32 * 8192 * 2, 1_000_000, 1_100_000]  # 32 rows of 8,192 values in bf16
        stored = ray.get(router.stored.remote(expert, sizes), timeout=3 * LIMIT_S)
    finally:
        ray.kill(expert)
        ray.kill(router)
    assert stored == [False, False, True]
