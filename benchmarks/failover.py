"""What a fault costs the streams that are under way: gaps between tokens, throughput, time back.

    python -m benchmarks.failover [--json FILE]

Serves the bundled model in fp32 and compares every token with that of the same deployment without a
fault. ``benchmarks/README.md`` describes the stretches. The exit status is 1 when a request failed
or was wrong.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import MODEL, command, percentile, progress, prompts, show, write_json
from benchmarks.serve import deployed

if TYPE_CHECKING:
    from cluster.reports import ClusterStatus
    from router.client import Client
    from tests.fault.load import Case, Wait

MODEL_PATH = "models/mesh-tiny"
ACTORS, COPIES, ROUTERS = 3, 2, 2
VOCAB = 2000
TOKENS, TOKENS_STEP = 96, 2
"""The first stream's length, and how much longer each other one is, so that not all end at once."""
REQUEST_TIMEOUT_S = 60.0
SETTLE_S = 3.0
STRETCH_S = 40.0
"""How long the load is looked at; the fault hits after a quarter, and three quarters show it."""
SHORT_S = 30.0
"""The same around a fault whose throughput is not the question."""
MINUTE_S = 60.0
BACK_S = 60.0
POLL_S = 0.1

QUIET, KILL, HANG = "no fault", "kill of an actor with copies elsewhere", "hang of such an actor"

Fault = Callable[["Client"], "ClusterStatus"]
Back = Callable[["ClusterStatus", "ClusterStatus"], bool]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is done under load, and how the status tells that all is as before.

    ``fault`` returns the status of before it; ``None`` for no fault. ``is_back`` compares that
    with a later one.
    """

    name: str
    seconds: float
    fault: Fault | None = None
    is_back: Back = lambda before, now: True


def window(name: str, waits: Sequence[Wait], begin_s: float, end_s: float) -> dict[str, Any]:
    """Return what the streams saw in a stretch of time: its pieces, and the gaps that touch it."""
    touching = [wait for wait in waits if wait.ended_s > begin_s and wait.began_s < end_s]
    gaps_s = sorted(wait.took_s for wait in touching if not wait.is_first)
    tokens = sum(wait.tokens for wait in waits if begin_s <= wait.ended_s < end_s)
    return {
        "name": name,
        "seconds": end_s - begin_s,
        "tokens_per_s": tokens / (end_s - begin_s),
        "gap_s": {
            "p50": percentile(gaps_s, 0.5),
            "p99": percentile(gaps_s, 0.99),
            "longest": gaps_s[-1],
        },
        "longest_first_s": max((wait.took_s for wait in touching if wait.is_first), default=0.0),
        "lost_s": lost_s(waits, begin_s, end_s),
    }


def lost_s(waits: Iterable[Wait], begin_s: float, end_s: float) -> float:
    """Return how many seconds' worth of tokens the middle half of a stretch lacks.

    A second's worth is what the first and the last quarter had a second, so that a machine whose
    speed drifts within minutes shows nothing.
    """
    quarter_s = (end_s - begin_s) / 4
    tokens = [0, 0, 0, 0]
    for wait in waits:
        if begin_s <= wait.ended_s < end_s:
            tokens[min(3, int((wait.ended_s - begin_s) / quarter_s))] += wait.tokens
    rate = (tokens[0] + tokens[3]) / (2 * quarter_s)
    return 2 * quarter_s - (tokens[1] + tokens[2]) / rate


def observe(client: Client, cases: Sequence[Case], scenario: Scenario) -> dict[str, Any]:
    """Load the deployment, do what the scenario says, and return what came of it."""
    from tests.fault.load import Load

    waits: list[Wait] = []
    pause = threading.Event()
    load = Load(client, MODEL, cases, len(cases), 0, REQUEST_TIMEOUT_S, waits.append)
    try:
        pause.wait(SETTLE_S)
        begin_s = time.monotonic()
        back_s = None
        if scenario.fault is not None:
            pause.wait(scenario.seconds / 4)
            back_s = _inflict(client, scenario.fault, scenario.is_back)
        pause.wait(max(0.0, begin_s + scenario.seconds - time.monotonic()))
        end_s = time.monotonic()
    finally:
        outcome = load.end()
    return {
        **window(scenario.name, waits, begin_s, end_s),
        "back_s": back_s,
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
    }


def _inflict(client: Client, fault: Fault, is_back: Back) -> float:
    """Do the fault; returns how long after it the status was as it should be."""
    from cluster.errors import ExpertMeshError

    pause, started_s = threading.Event(), time.monotonic()
    before = fault(client)
    while time.monotonic() < started_s + BACK_S:
        try:
            if is_back(before, client.status()):
                return time.monotonic() - started_s
        except ExpertMeshError:  # the controller is away
            pass
        pause.wait(POLL_S)
    raise RuntimeError(f"not as before within {BACK_S:g} s")


def fault_of(deed: str, pid_of: Callable[[ClusterStatus], int]) -> Fault:
    """Return the fault that does ``kill`` or ``stop`` of ``tests.fault.signals`` to a process."""

    def inflict(client: Client) -> ClusterStatus:
        from tests.fault import signals

        told = client.status()
        getattr(signals, deed)(told, pid_of(told))
        return told

    return inflict


kill_actor = fault_of("kill", lambda told: told.actors[0].pid)
hang_actor = fault_of("stop", lambda told: told.actors[0].pid)
"""The controller replaces it then."""
kill_controller = fault_of("kill", lambda told: told.controller_pid)
kill_router = fault_of("kill", lambda told: told.routers[0].pid)


def actor_is_back(before: ClusterStatus, now: ClusterStatus) -> bool:
    """Tell whether the first actor has a successor and every expert its copies."""
    new = {actor.actor_id: actor.generation for actor in now.actors}
    first = before.actors[0]
    return new.get(first.actor_id, 0) > first.generation and now.live_copies >= now.min_copies


def controller_is_back(before: ClusterStatus, now: ClusterStatus) -> bool:
    """Tell whether another controller has all actors, and they are the same processes."""
    pids = [[actor.pid for actor in one.actors] for one in (before, now)]
    if now.controller_pid != before.controller_pid and not set(pids[1]) <= set(pids[0]):
        raise RuntimeError("the controller's end has replaced an actor")
    return now.controller_pid != before.controller_pid and pids[0] == pids[1]


def router_is_back(before: ClusterStatus, now: ClusterStatus) -> bool:
    """Tell whether there is a router that was not there before."""
    return bool({router.pid for router in now.routers} - {router.pid for router in before.routers})


def with_copies(rounds: int, seconds: float) -> list[Scenario]:
    """Return stretches without a fault around stretches with a kill, and a hang."""
    quiet, killed = Scenario(QUIET, seconds), Scenario(KILL, seconds, kill_actor, actor_is_back)
    hung = Scenario(HANG, SHORT_S, hang_actor, actor_is_back)
    return [quiet, *[killed, quiet] * rounds, hung]


WITHOUT_COPIES = [
    Scenario("kill of the only copy", SHORT_S, kill_actor, actor_is_back),
    Scenario("kill of the controller", SHORT_S, kill_controller, controller_is_back),
    Scenario("kill of a router", SHORT_S, kill_router, router_is_back),
]
"""What is lost where nothing stands by."""


def lengths_of(streams: int) -> Sequence[int]:
    """Return how many tokens each stream generates."""
    return range(TOKENS, TOKENS + TOKENS_STEP * streams, TOKENS_STEP)


def answers(client: Client, lengths: Sequence[int]) -> list[Case]:
    """Return prompts, all different, with what the deployment makes of them without a fault.

    Each has so many tokens as ``lengths`` says.
    """
    from router.client import Sampling
    from tests.fault.load import Case

    def answer(prompt: Sequence[int], tokens: int) -> Case:
        # The bundled vocabulary is smaller than that of the benchmarks' random model.
        prompt = [2 + token_id % VOCAB for token_id in prompt]
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        [reply] = client.generate(prompt, sampling, model=MODEL, timeout_s=REQUEST_TIMEOUT_S)
        return Case(tuple(prompt), reply.token_ids)

    with ThreadPoolExecutor(len(lengths)) as pool:
        return list(pool.map(answer, prompts(len(lengths)), lengths))


def run(streams: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    from router.client import Client

    parts = [(1, COPIES, with_copies(rounds, seconds)), (ROUTERS, 1, WITHOUT_COPIES)]
    windows = []
    with progress("failover", sum(2 + len(scenarios) for _, _, scenarios in parts)) as begin:
        for routers, copies, scenarios in parts:
            begin("deployment")
            served = deployed(Path(MODEL_PATH), ACTORS, routers, copies)
            # Without retries, so that what the server lets through is seen.
            with served as ports, Client(ports.grpc_address, retry=None) as client:
                begin("answers without faults")
                cases = answers(client, lengths_of(streams))
                for scenario in scenarios:
                    begin(scenario.name)
                    windows.append(observe(client, cases, scenario))
    return {
        "streams": streams,
        "seconds": seconds,
        "actors": ACTORS,
        "windows": windows,
        "kills": kills(windows),
    }


def kills(windows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Compare each stretch with a kill with those without a fault around it.

    ``lost_s`` is the throughput that it lacks (:func:`lost_s`), and ``noise_s`` what those without
    a fault seem to lack; ``above_s`` is how much longer the longest gap between two tokens is than
    the longest without a fault.
    """
    compared = []
    for before, killed, after in zip(windows, windows[1:], windows[2:], strict=False):
        if killed["name"] != KILL:
            continue
        normal_s = max(one["gap_s"]["longest"] for one in (before, after))
        compared.append(
            {
                "lost_s": killed["lost_s"],
                "noise_s": statistics.mean(one["lost_s"] for one in (before, after)),
                "normal_s": normal_s,
                "above_s": killed["gap_s"]["longest"] - normal_s,
            }
        )
    return compared


def minute_ratio(compared: Sequence[Mapping[str, float]]) -> float:
    """Return the throughput of a minute with one kill, as a part of a minute without a fault."""
    return 1 - statistics.mean(one["lost_s"] for one in compared) / MINUTE_S


WINDOW_COLUMNS = (
    "", "s|.0f", "tok/s|.0f", "gap p50 s|.3f", "p99|.3f", "longest|.3f",
    "first token longest s|.2f", "back after s|.1f", "requests", "failed or wrong",
)  # fmt: skip


def window_rows(windows: Iterable[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """Return the rows of windows under :data:`WINDOW_COLUMNS`."""
    return [
        (
            *(one[key] for key in ("name", "seconds", "tokens_per_s")),
            *(one["gap_s"][part] for part in ("p50", "p99", "longest")),
            *(one[key] for key in ("longest_first_s", "back_s", "requests")),
            ", ".join(f"{count} {reason}" for reason, count in one["failures"].items()) or "0",
        )
        for one in windows
    ]


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    title = f"failover, {result['streams']} streams"
    show(title, window_rows(result["windows"]), WINDOW_COLUMNS)
    kill_rows = [(place, *one.values()) for place, one in enumerate(result["kills"], 1)]
    columns = ["", "throughput lost s|.3f", "the same without|.3f", "longest gap without s|.3f"]
    show("stretches with a kill", kill_rows, [*columns, "longest gap above that s|.3f"])
    ratio = minute_ratio(result["kills"])
    print(f"a minute with a kill has {ratio:.3f} of the tokens of one without")


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command("failover", __doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="stretches with a kill")
    parser.add_argument("--seconds", type=float, default=STRETCH_S, help="length of a stretch")
    options = parser.parse_args()
    result = run(options.streams, options.rounds, options.seconds)
    report(result)
    write_json("failover", result, options.json)
    return int(any(one["failures"] for one in result["windows"]))


if __name__ == "__main__":
    sys.exit(main())
