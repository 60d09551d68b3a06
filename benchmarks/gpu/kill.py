"""A deployment on the card, one of whose actors is killed under load.

Gateway, router and actors of the bundled model in fp32, with two copies of each expert; the router
and the actors share the card by fractions, as in ``deploy/gpu.yaml``. Every token of the streams is
compared with that of the same deployment before the kill.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import CACHE_TOKENS, MODEL
from benchmarks.failover import (
    COPIES,
    KILL,
    MODEL_PATH,
    QUIET,
    Scenario,
    actor_is_back,
    answers,
    kill_actor,
    lengths_of,
    observe,
)
from benchmarks.gpu.settings import ACTORS_SHARE, Settings
from benchmarks.serve import served

ROUTER_SHARE = round(1 - ACTORS_SHARE, 3)
STATS_TIMEOUT_S = 10.0


def args(settings: Settings) -> dict[str, Any]:
    """Return the application's ``args:``."""
    pool = {
        "name": "gpu",
        "actors": settings.kill_actors,
        "num_gpus": settings.actor_gpus(settings.kill_actors),
    }
    return {
        "models": [{"id": MODEL, "path": MODEL_PATH}],
        "experts": {"min_copies": COPIES, "pools": [pool]},
        "router": {
            "cache_tokens": CACHE_TOKENS,
            "num_gpus": ROUTER_SHARE if settings.has_device else 0.0,
        },
    }


def run(settings: Settings) -> dict[str, Any]:
    """Load the deployment without a fault and with one; returns both stretches."""
    from ray import serve

    from router.app import build
    from router.client import Client

    scenarios = [
        Scenario(QUIET, settings.quiet_s),
        Scenario(KILL, settings.kill_s, kill_actor, actor_is_back),
    ]
    print("starting the deployment", flush=True)
    application = served(build, args(settings), num_gpus=int(settings.has_device))
    # Without retries, so that what the server lets through is seen.
    with application as ports, Client(ports.grpc_address, retry=None) as client:
        print("answers without a fault", flush=True)
        cases = answers(client, lengths_of(settings.kill_streams))
        windows = []
        for scenario in scenarios:
            print(scenario.name, flush=True)
            windows.append(observe(client, cases, scenario))
        router = serve.get_deployment_handle(f"Router-{MODEL}", MODEL).stats.remote()
        on_router = router.result(timeout_s=STATS_TIMEOUT_S)["device"]
        devices = sorted({on_router, *(actor.device for actor in client.status().actors)})
    if settings.has_device and "cpu" in devices:
        raise RuntimeError(f"a process was to have a part of the card (devices: {devices})")
    return {"actors": settings.kill_actors, "devices": devices, "windows": windows}


def kept(result: dict[str, Any]) -> bool:
    """Return whether no request failed or got another token, and the killed actor came back."""
    return all(not one["failures"] and one["requests"] for one in result["windows"]) and all(
        one["back_s"] is not None for one in result["windows"] if one["name"] == KILL
    )
