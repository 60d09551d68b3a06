"""Random faults against a deployment under load: nothing fails, nothing is wrong, nothing grows.

    python -m benchmarks.soak [--minutes 20] [--every-s 5] [--seed N] [--no-faults] [--json FILE]

Serves the bundled model; ``benchmarks/README.md`` describes load, faults and damage. The exit
status is 1 when a request failed or was wrong, when no damage was seen, or when a process grew.
Without faults every process lives as long as the run, so that its memory is seen over all of it.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import CACHE_TOKENS, MODEL, command, progress, show, write_json
from benchmarks.failover import MODEL_PATH, REQUEST_TIMEOUT_S, answers
from benchmarks.growth import Sampler, show_growth
from benchmarks.serve import served
from benchmarks.serve_clients import Ports
from cluster.errors import ExpertMeshError

if TYPE_CHECKING:
    from router.client import Client
    from tests.fault.injector import Hit
    from tests.fault.load import Case, Wait

ACTORS, ROUTERS = 3, 2
STREAMS, UNARY = 6, 2
PROMPTS, TOKENS = 8, 48
REDEPLOY_S = 180.0
DAMAGE_REASONS = ("not_finite", "damaged", "malformed")
LONG_S, WAITS_SHOWN = 1.0, 8
"""A stream's wait for its next token is noted from the first on; so many are shown."""
LEAD_S = 10.0
"""The longest waits are told with the faults from so long before they began."""


def longest_apart(waits: Sequence[Wait], count: int) -> list[Wait]:
    """Return the ``count`` longest waits, the longest first, of which no two overlap.

    One fault makes many streams wait at the same time.
    """
    chosen: list[Wait] = []
    for wait in sorted(waits, key=lambda one: -one.took_s):
        is_apart = all(wait.began_s >= o.ended_s or o.began_s >= wait.ended_s for o in chosen)
        if len(chosen) < count and is_apart:
            chosen.append(wait)
    return chosen


def met(wait: Wait, hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Return the faults that a wait may come from, each with its time after the wait's begin."""
    return [
        {**asdict(hit.fault), "pid": hit.pid, "after_s": hit.at_s - wait.began_s}
        for hit in hits
        if wait.began_s - LEAD_S <= hit.at_s <= wait.ended_s
    ]


def run(minutes: float, every_s: float, seed: int, has_faults: bool) -> dict[str, Any]:
    """Run the whole soak; returns what ``--json`` writes."""
    from router.client import Client
    from tests.fault.injector import inject
    from tests.fault.load import Load
    from tests.fault.schedule import WITH_REDEPLOY, schedule

    faults = schedule(seed, 60 * minutes, every_s, WITH_REDEPLOY) if has_faults else []
    hits: list[Hit] = []
    waits: list[Wait] = []

    def waited(wait: Wait) -> None:
        if wait.took_s >= LONG_S:
            waits.append(wait)

    with progress("soak", 2 + len(faults)) as begin, tempfile.TemporaryDirectory() as folder:
        begin("deployment")
        weights = Weights(Path(folder), is_damaging=has_faults)
        served = weights.served()
        with served as ports, Client(ports.grpc_address) as client:
            begin("answers without faults")
            cases = weights.answers(client)
            load = Load(client, MODEL, cases, STREAMS, UNARY, REQUEST_TIMEOUT_S, waited)
            sampler, started_s = Sampler(), time.monotonic()

            def told(hit: Hit) -> None:
                hits.append(hit)
                failed = load.outcome().failures.total()
                begin(f"{hit.fault.kind.value} {hit.pid}, {failed} failed")

            try:
                # A redeploy takes longer than the time between two faults.
                in_time = takewhile(lambda _: time.monotonic() - started_s < 60 * minutes, faults)
                inject(in_time, client.status, told, lambda: weights.redeploy(client))
                time.sleep(0 if has_faults else 60 * minutes)
            finally:
                outcome = load.end()
            took_s = time.monotonic() - started_s
            processes = sampler.end()
            damages = damages_of(ports)
    longest = longest_apart(
        [replace(wait, began_s=wait.began_s - started_s) for wait in waits], WAITS_SHOWN
    )
    return {
        "minutes": minutes,
        "every_s": every_s,
        "seed": seed,
        "faults": dict(Counter(hit.fault.kind.value for hit in hits)),
        "requests": outcome.requests,
        "failures": dict(outcome.failures),
        "damages": damages,
        "waits": [{**asdict(wait), "faults": met(wait, hits)} for wait in longest],
        "tokens_per_s": outcome.tokens / took_s,
        "processes": [asdict(one) for one in processes],
    }


class Weights:
    """The bundled model, and one with other weights, deployed in turn under the same id."""

    def __init__(self, folder: Path, is_damaging: bool) -> None:
        """Write the other weights to ``folder``."""
        self._folders = itertools.cycle([str(swapped_experts(folder)), MODEL_PATH])
        self._is_damaging = is_damaging

    def answers(self, client: Client) -> list[Case]:
        """Return prompts with the answers of the weights that may be deployed."""
        cases = answers(client, [TOKENS] * PROMPTS)
        if not self._is_damaging:
            return cases
        self.redeploy(client)
        others = [other.expected for other in answers(client, [TOKENS] * PROMPTS)]
        return [replace(case, others=(other,)) for case, other in zip(cases, others, strict=True)]

    def served(self) -> AbstractContextManager[Ports]:
        """Serve the bundled model until the block ends."""
        return served(self._build, self._args(MODEL_PATH))

    def _args(self, folder: str) -> dict[str, Any]:
        return {
            "models": [{"id": MODEL, "path": folder}],
            "experts": {"actors": ACTORS},
            "router": {"cache_tokens": CACHE_TOKENS, "replicas": ROUTERS},
        }

    def _build(self, args: dict[str, Any]) -> Any:
        from router.app import application
        from router.serve.controller import ControllerDeployment
        from tests.fault.damage import DamagingController

        self._listen = args["gateway"]["listen"]
        return application(args, DamagingController if self._is_damaging else ControllerDeployment)

    def redeploy(self, client: Client) -> None:
        """Deploy the other weights; returns when they serve alone."""
        from ray import serve

        before = client.status()
        weight_bytes = sum(actor.weight_bytes for actor in before.actors)
        args = {**self._args(next(self._folders)), "gateway": {"listen": self._listen}}
        serve.run(self._build(args), name=MODEL, route_prefix="/")
        old = {router.pid for router in before.routers}
        deadline_s = time.monotonic() + REDEPLOY_S
        while True:
            try:
                now = client.status()
                is_alone = sum(actor.weight_bytes for actor in now.actors) == weight_bytes
                if is_alone and not old & {router.pid for router in now.routers}:
                    return
            except ExpertMeshError:  # the controller is away for a moment
                pass
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the redeploy took more than {REDEPLOY_S:g} s")
            time.sleep(0.5)


def swapped_experts(folder: Path) -> Path:
    """Save the bundled model with its experts in another order, so that its tokens are others."""
    import importlib.resources
    import re

    from safetensors.torch import load_file, save_file

    source = Path(str(importlib.resources.files("deploy"))) / MODEL_PATH
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            swapped = {
                re.sub(r"\.experts\.([01])\.", lambda m: f".experts.{1 - int(m[1])}.", name): tensor
                for name, tensor in tensors.items()
            }
            save_file(swapped, folder / file.name, {"format": "pt"})
        elif file.is_file():
            shutil.copy(file, folder / file.name)
    return folder


def damages_of(ports: Ports) -> dict[str, int]:
    """Return how many frames were asked for again, by reason, of the routers that live."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    counts: Counter[str] = Counter()
    told = httpx.get(f"http://127.0.0.1:{ports.http}/metrics").text
    for family in text_string_to_metric_families(told):
        for sample in family.samples:
            if sample.name == "expertmesh_dispatch_retries_total":
                counts[sample.labels["reason"]] += int(sample.value)
    return {reason: counts[reason] for reason in DAMAGE_REASONS if counts[reason]}


def report(result: Mapping[str, Any]) -> None:
    """Print the tables and the verdict."""
    figures = [
        *result["faults"].items(),
        ("requests", result["requests"]),
        *((f"asked again: {reason}", count) for reason, count in result["damages"].items()),
        *((f"failed: {reason}", count) for reason, count in result["failures"].items()),
        ("tokens/s", result["tokens_per_s"]),
    ]
    show(f"soak, {result['minutes']:g} minutes, seed {result['seed']}", figures, ["", "count|.0f"])
    show(
        f"longest waits for a token, and the faults from {LEAD_S:g} s before each",
        [
            (one["began_s"], one["took_s"], ", ".join(map(_told, one["faults"])))
            for one in result["waits"]
        ],
        ["began, s|.1f", "took, s|.1f", "faults, by seconds after the begin"],
    )
    show_growth(result["processes"])


def _told(fault: Mapping[str, Any]) -> str:
    lasted = f" for {fault['pause_s']:.1f} s" if fault["pause_s"] else ""
    return f"{fault['after_s']:+.1f} {fault['kind']}{lasted}"


def is_good(result: Mapping[str, Any]) -> bool:
    """Tell whether no request failed or was wrong, and every long-lived process is flat.

    Where there were faults, damage must have been among them.
    """
    has_hit = bool(result["damages"]) or not result["faults"]
    return has_hit and not result["failures"] and all(one["is_flat"] for one in result["processes"])


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0, help="the same seed has the same faults")
    parser.add_argument("--no-faults", action="store_true", help="load alone, all the time")
    options = parser.parse_args()
    result = run(options.minutes, options.every_s, options.seed, not options.no_faults)
    report(result)
    write_json("soak", result, options.json)
    return int(not is_good(result))


if __name__ == "__main__":
    sys.exit(main())
