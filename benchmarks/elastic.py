"""Copies and actors that follow the load, on emulated devices, in the whole deployment.

    python -m benchmarks.elastic [--seconds 12] [--quick] [--seed N] [--json FILE]

Serves a checkpoint whose tokens choose their experts (``benchmarks.steered``) over actors that take
an accelerator's time (``experts.emulate``). ``benchmarks/README.md`` describes both loads. The exit
status is 1 when a figure is missed or a request failed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import steered
from benchmarks.common import MODEL, Verdict, command, progress, show, show_verdicts, write_json
from benchmarks.load_step import TIMEOUT_S, Clients, Plan, run_step
from benchmarks.serve import served
from benchmarks.serve_clients import Ports

DEVICES, STREAMS, ROUTERS = 8, 64, 8
"""Of Zipf's load. A router has all rows of one expert in one step computed by one copy, so there
are several routers for copies to serve."""
SECONDS, QUICK_SECONDS = 12.0, 6.0
SETTLE_S = 8.0
"""What copies have to come before throughput is measured."""
BATCH_S, ROW_S = 0.005, 0.035
"""Of Zipf's devices; a product of one row takes 40 ms, ten times what all processes need for it."""
BUDGET_BYTES = 10**8
"""For all experts, which are small, on each device."""
REBALANCE_S = 0.1
MIN_GAIN = 1.8

ACTORS, MAX_ACTORS, STEP_ROUTERS = 2, 6, 4
STEP_BATCH_S, STEP_ROW_S = 0.010, 0.010
TARGETS = {
    "min_actors": ACTORS,
    "max_actors": MAX_ACTORS,
    "target_busy": 0.7,
    "target_queue_s": 0.060,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 10.0,
}
FOLLOWS = {"memory_budget_bytes": BUDGET_BYTES, "rebalance_period_s": REBALANCE_S}
ZIPF = {"actors": DEVICES, "emulate": {"batch_s": BATCH_S, "row_s": ROW_S}}
ZIPF_CASES = {"one copy": ZIPF, "copies follow": {**ZIPF, **FOLLOWS}}
STEP_CASES = {
    case: {
        "actors": ACTORS,
        "emulate": {"batch_s": STEP_BATCH_S, "row_s": STEP_ROW_S},
        "autoscaling": {**TARGETS, "standby_actors": standby_actors},
        **FOLLOWS,
    }
    for case, standby_actors in (("none stands by", 0), ("two stand by", 2))
}
"""The configuration of the experts, by case."""
NEW_COPY_S, NEW_ACTOR_S = 1.0, 5.0
PLAN, QUICK_PLAN = Plan(base_s=15, crowd_s=40, after_s=5), Plan(base_s=12, crowd_s=25, after_s=3)
APART_S = 0.1
"""Between the starts of two streams, so that Serve sees which router has fewer."""
TOKENS = 3000


def rate(arrivals: Sequence[tuple[float, int]], start_s: float, end_s: float) -> float:
    """Return a stream's tokens per second within a time, from its first piece there to its last.

    So that it does not matter how the ends of the time lie between two tokens. Zero where there
    are fewer than two pieces.
    """
    within = [(at_s, tokens) for at_s, tokens in arrivals if start_s <= at_s <= end_s]
    if len(within) < 2:
        return 0.0
    return sum(tokens for _, tokens in within[1:]) / (within[-1][0] - within[0][0])


def measure_zipf(ports: Ports, seconds: float) -> dict[str, Any]:
    """Return the throughput of endless streams under Zipf's load, and how many copies there are."""
    from router.client import Client

    apart = steered.ZIPF_CYCLE / STREAMS
    tokens = [steered.zipf_token(int(apart * i)) for i in range(STREAMS)]
    # Streams of one expert start one after the other, so that they go to different routers.
    tokens.sort(key=lambda token: steered.expert_of(0, token))
    clients = Clients(ports, TOKENS)
    try:
        clients.come(tokens, APART_S * STREAMS)
        wait_started(clients)
        time.sleep(SETTLE_S)
        start_s = time.perf_counter()
        time.sleep(seconds)
        end_s = time.perf_counter()
    finally:
        clients.close()
    if clients.failures:
        raise RuntimeError(clients.failures[0])
    with Client(ports.grpc_address) as client:
        copies = sum(len(one.actors) for one in client.load().experts)
    rates = [rate(answer.pieces, start_s, end_s) for answer in clients.answers]
    return {"tokens_per_s": sum(rates), "copies": copies}


def wait_started(clients: Clients) -> None:
    """Return when every stream has had a few tokens, or one has failed."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while sum(len(one.pieces) >= 3 for one in clients.answers) < STREAMS and not clients.failures:
        if time.monotonic() > deadline_s:
            raise TimeoutError("the streams did not start")
        time.sleep(0.05)


def _application(args: dict[str, Any]) -> Any:
    from benchmarks.devices import RecordingRemoteActor
    from router.app import application
    from router.serve.controller import ControllerDeployment

    class RecordingController(ControllerDeployment):
        actor_class = RecordingRemoteActor

    return application(args, RecordingController)


def _args(folder: Path, experts: Mapping[str, Any], routers: int) -> dict[str, Any]:
    return {
        "models": [{"id": MODEL, "path": str(folder)}],
        "experts": dict(experts),
        "router": {"replicas": routers},
    }


def run(seconds: float, plan: Plan, seed: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    zipf, steps = {}, {}
    with tempfile.TemporaryDirectory() as name, progress("elastic", 4) as begin:
        folder = Path(name)
        steered.save(folder)
        for case, experts in ZIPF_CASES.items():
            begin(f"Zipf's load, {case}")
            with served(_application, _args(folder, experts, ROUTERS)) as ports:
                zipf[case] = measure_zipf(ports, seconds)
        for case, experts in STEP_CASES.items():
            begin(f"a load that steps, {case}")
            with served(_application, _args(folder, experts, STEP_ROUTERS)) as ports:
                steps[case] = run_step(ports, plan, ACTORS, seed)
    alone, copied = (one["tokens_per_s"] for one in zipf.values())
    return {"targets": TARGETS, "zipf": zipf, "steps": steps, "gain": copied / alone}


def judge(result: Mapping[str, Any]) -> list[Verdict]:
    """Judge every figure that is promised."""
    delay_s = result["targets"]["downscale_delay_s"]
    verdicts = [
        Verdict(
            "throughput under Zipf's load, over that with one copy of each expert",
            f"{result['gain']:.2f}",
            f"at least {MIN_GAIN:g}",
            result["gain"] >= MIN_GAIN,
        )
    ]
    for case, step in result["steps"].items():
        served_s, gone_s = step["served_s"], step["gone_s"]
        verdicts += [
            _within(
                f"{case}: a copy serves, on an actor with others", served_s["standing"], NEW_COPY_S
            ),
            _within(f"{case}: on one that had none", served_s["new"], NEW_ACTOR_S),
            _within(f"{case}: its actors are gone, after the load", gone_s["actors"], delay_s),
            _within(f"{case}: its copies are gone", gone_s["copies"], delay_s),
            Verdict(
                f"{case}: failed or wrong answers",
                f"{len(step['failures'])} of {step['answers']}",
                "none",
                not step["failures"],
            ),
        ]
    return verdicts


def _within(figure: str, took_s: float | None, most_s: float) -> Verdict:
    told = "never" if took_s is None else f"after {took_s:.2f} s"
    return Verdict(figure, told, f"within {most_s:g} s", took_s is not None and took_s <= most_s)


def report(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    rows = [
        (
            case,
            one["tokens_per_s"],
            one["tokens_per_s"] / result["zipf"]["one copy"]["tokens_per_s"],
            one["copies"],
        )
        for case, one in result["zipf"].items()
    ]
    title = f"Zipf's load: {STREAMS} streams, {DEVICES} devices"
    show(title, rows, ["", "tok/s|.1f", "gain|.2f", "copies"])
    for case, step in result["steps"].items():
        numbers = [(what, *of_times.values()) for what, of_times in step["numbers"].items()]
        show(case, numbers, ["", "before", "most", "after"])
        for failure in step["failures"][:5]:
            print(failure)


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command("elastic", __doc__)
    parser.add_argument("--seconds", type=float, help="how long each of Zipf's cases is measured")
    parser.add_argument("--quick", action="store_true", help="6 seconds, and a shorter crowd")
    parser.add_argument("--seed", type=int, default=0, help="the same seed has the same pauses")
    options = parser.parse_args()
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    result = run(seconds, QUICK_PLAN if options.quick else PLAN, options.seed)
    report(result)
    write_json("elastic", result, options.json)
    return show_verdicts("elastic", judge(result))


if __name__ == "__main__":
    sys.exit(main())
