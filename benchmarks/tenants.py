"""Whether a tenant that floods a deployment beyond its quota holds up a quiet one.

    python -m benchmarks.tenants [--seconds 20] [--rounds 3] [--factor 20] [--json FILE]

Serves the bundled model to two keys. The quiet tenant asks at a steady, low rate. The other asks at
its quota, and then at ``--factor`` times as much, by turns; what is beyond the quota is refused.
Promised: with the flood the quiet tenant's 99th percentile is at most 1.5 times as long. Clients
share the cores with the deployment. The exit status is 1 where the promise is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    Figure,
    Verdict,
    finish,
    machine,
    output_options,
    progress,
    show,
    show_verdicts,
    summary_ms,
)
from benchmarks.serve import served

if TYPE_CHECKING:
    from benchmarks.serve_clients import Ports
    from router.client import AsyncClient

MOST = 1.5
"""How many times as long the quiet tenant's 99th percentile may be while another floods."""
QUIET_PER_S, QUOTA_PER_S, TOKENS = 5.0, 5.0, 24
AT_QUOTA, FLOODS = "at its quota", "floods"
PROMPT = "And the LORD said"
ROOM = 200
"""The most requests of the flood that are under way in the client at one time."""


@dataclass
class Phase:
    """The quiet tenant's times, and what became of the other's requests."""

    quiet_s: list[float] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def due_s(per_s: float, seconds: float) -> list[float]:
    """Return when requests are sent, evenly."""
    return [place / per_s for place in range(int(per_s * seconds))]


async def _send(client: AsyncClient) -> str:
    """Send a request; returns ``answered``, or the code of its error."""
    from cluster.errors import ExpertMeshError
    from router.client import Sampling

    sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    try:
        await client.generate(PROMPT, sampling, timeout_s=30.0)
    except ExpertMeshError as error:
        return error.code.value
    return "answered"


async def _quiet(client: AsyncClient, at_s: float, phase: Phase) -> None:
    outcome = await _send(client)
    if outcome != "answered":
        raise RuntimeError(f"a request of the quiet tenant failed: {outcome}")
    phase.quiet_s.append(time.monotonic() - at_s)


async def _other(client: AsyncClient, room: asyncio.Semaphore, phase: Phase) -> None:
    if room.locked():
        phase.others["not sent"] += 1
        return
    async with room:
        phase.others[await _send(client)] += 1


async def _phase(ports: Ports, keys: Sequence[str], other_per_s: float, seconds: float) -> Phase:
    from router.client import AsyncClient

    phase, room = Phase(), asyncio.Semaphore(ROOM)
    quiet_key, other_key = keys
    async with (
        AsyncClient(ports.grpc_address, retry=None, api_key=quiet_key) as quiet,
        AsyncClient(ports.grpc_address, retry=None, api_key=other_key) as other,
        asyncio.TaskGroup() as group,
    ):
        begun_s = time.monotonic()
        planned = [(at_s, True) for at_s in due_s(QUIET_PER_S, seconds)]
        planned += [(at_s, False) for at_s in due_s(other_per_s, seconds)]
        for at_s, is_quiet in sorted(planned):
            await asyncio.sleep(begun_s + at_s - time.monotonic())
            if is_quiet:
                group.create_task(_quiet(quiet, begun_s + at_s, phase))
            else:
                group.create_task(_other(other, room, phase))
    return phase


def run(seconds: float, rounds: int, factor: float) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    from router.app import build
    from router.security.keys import Role
    from router.security.keys_file import add_key
    from router.security.limits import KeyLimits

    phases = {AT_QUOTA: Phase(), FLOODS: Phase()}
    with tempfile.TemporaryDirectory() as name, progress("tenants", 2 * rounds + 1) as begin:
        file = Path(name) / "keys.yaml"
        os.environ["EXPERTMESH_API_KEY"] = add_key(file, "operator", list(Role))
        keys = [
            add_key(file, "quiet", [Role.INFERENCE]),
            add_key(file, "other", [Role.INFERENCE], KeyLimits(requests_per_s=QUOTA_PER_S)),
        ]
        args = {
            "models": [{"id": "mesh-tiny", "path": "models/mesh-tiny"}],
            "security": {"keys_file": str(file)},
        }
        begin("deployment")
        with served(build, args) as ports:
            asyncio.run(_phase(ports, keys, QUOTA_PER_S, 3.0))  # makes the connections
            for _ in range(rounds):
                for kind, phase in phases.items():
                    begin(f"the other {kind}")
                    per_s = QUOTA_PER_S * (factor if kind == FLOODS else 1.0)
                    one = asyncio.run(_phase(ports, keys, per_s, seconds))
                    phase.quiet_s += one.quiet_s
                    phase.others += one.others
    return {
        "benchmark": "tenants",
        "machine": machine(),
        "seconds": seconds,
        "factor": factor,
        "phases": {
            kind: {"quiet": summary_ms(phase.quiet_s), "others": dict(phase.others)}
            for kind, phase in phases.items()
        },
    }


def ratio(result: dict[str, Any]) -> float:
    """Return the quiet tenant's 99th percentile with the flood over that without."""
    with_flood, without = (result["phases"][kind]["quiet"]["p99_ms"] for kind in (FLOODS, AT_QUOTA))
    return float(with_flood / without)


def report(result: dict[str, Any]) -> bool:
    """Print the tables; returns whether the promise is kept."""
    rows = []
    for kind, phase in result["phases"].items():
        others = ", ".join(f"{count} {what}" for what, count in sorted(phase["others"].items()))
        quiet = phase["quiet"]
        rows.append((kind, f"{quiet['p50_ms']:.0f}", f"{quiet['p99_ms']:.0f}", others))
    show("tenants", rows, ["the other tenant", "quiet p50 ms", "p99", "the other's requests"])
    is_kept = ratio(result) <= MOST
    promise = ("quiet p99, flood / quota", f"{ratio(result):.2f}", f"≤ {MOST:g}", is_kept)
    show_verdicts("promise", [Verdict(*promise)])
    return is_kept


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--factor", type=float, default=20.0)
    output_options(parser)
    options = parser.parse_args()
    result = run(options.seconds, options.rounds, options.factor)
    is_kept = report(result)
    figures = {"quiet p99, flood / quota": Figure(ratio(result), "lower")}
    return finish(result, figures, options) or int(not is_kept)


if __name__ == "__main__":
    sys.exit(main())
