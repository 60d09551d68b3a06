"""What is said of replicas for which Ray finds no place."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys

import pytest

from router.serve import waiting
from router.serve.waiting import Notices, Waiting, line_of, resources_of

ROUTER = Waiting("Router-m", (("CPU", 0.1), ("GPU", 0.5)), 1)
OTHER = Waiting("Router-n", (("CPU", 0.1),), 2)
CPUS = {"Alive": True, "Resources": {"CPU": 4.0}}


def test_a_wait_is_logged_after_ten_seconds_and_then_ever_more_seldom() -> None:
    notices = Notices()
    logged = [now_s for now_s in range(0, 2000, 10) if notices.due([ROUTER], now_s)]
    assert logged == [10, 20, 40, 80, 160, 320, 640, 960, 1280, 1600, 1920]


def test_each_deployment_waits_for_itself_and_a_later_wait_is_a_new_one() -> None:
    notices = Notices()
    assert notices.due([ROUTER], 0) == []
    assert notices.due([ROUTER, OTHER], 10) == [ROUTER]
    assert notices.due([ROUTER, OTHER], 20) == [ROUTER, OTHER]
    assert notices.due([OTHER], 30) == [OTHER]
    assert notices.due([ROUTER, OTHER], 40) == []
    assert notices.due([ROUTER, OTHER], 50) == [ROUTER, OTHER]


def test_the_line_says_what_is_needed_and_what_no_node_has() -> None:
    assert line_of(ROUTER, [CPUS, CPUS]) == (
        "Router-m waits for a place: it needs CPU 0.1, GPU 0.5; none of the 2 nodes has so much GPU"
    )
    full = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
    assert line_of(OTHER, [full]) == (
        "Router-n waits for a place for 2 replicas: it needs CPU 0.1, which is in use on all nodes "
        "that have it (1)"
    )


def test_resources_are_compared_as_ray_counts_them() -> None:
    assert resources_of({"big": 1.0, "GPU": 0.1 + 0.2, "CPU": 0.0}) == (("GPU", 0.3), ("big", 1.0))


def test_a_ray_that_does_not_answer_is_asked_again_and_one_with_other_answers_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def fails(app: str) -> list[Waiting]:
        asked.append(app)
        if len(asked) > 2:
            raise AttributeError("no get_actor_table in this release")
        raise RuntimeError("no connection")

    monkeypatch.setattr(waiting, "waiting_replicas", fails)
    monkeypatch.setattr(waiting, "PLACE_NOTICE_S", 0.0)
    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(waiting.say_why_replicas_wait("a"), 10))
    assert [record.getMessage() for record in caplog.records] == [
        *["Ray cannot be asked which replicas wait for a place: no connection"] * 2,
        "this Ray does not tell which replicas wait for a place",
    ]
    assert asked == ["a"] * 3


PROGRAM = """
import time
import ray
from router.serve.waiting import waiting_replicas

ray.init(
    address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
    logging_level="warning", namespace="serve",
)

@ray.remote
class Replica:
    def __init__(self, starts_s: float = 0.0) -> None:
        time.sleep(starts_s)
    def ready(self) -> None:
        pass

def replica(name: str, starts_s: float = 0.0, **resources: float):
    return Replica.options(name=name, num_cpus=0.1, **resources).remote(starts_s)

holder = replica("holds the GPU", num_gpus=0.8)
ray.get(holder.ready.remote())
replicas = [
    replica("SERVE_REPLICA::app#Router-m#1", num_gpus=0.5),
    replica("SERVE_REPLICA::app#Router-m#2", num_gpus=0.5),
    replica("SERVE_REPLICA::app#Router-n#1", num_gpus=4),
    replica("SERVE_REPLICA::app#Gateway#1", starts_s=60.0),
    replica("SERVE_REPLICA::another#Router-m#1", num_gpus=4),
    replica("no replica", num_gpus=4),
]
for _ in range(100):
    found = waiting_replicas("app")
    if len(found) == 2:
        break
    time.sleep(0.2)
print(found)
ray.kill(holder)
for _ in range(100):
    found = waiting_replicas("app")
    if not any(wait.deployment == "Router-m" for wait in found):
        break
    time.sleep(0.2)
print(found)
"""


def test_ray_tells_which_replicas_it_has_not_placed() -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()[-2:]
    n = "Waiting(deployment='Router-n', needed=(('CPU', 0.1), ('GPU', 4.0)), num_replicas=1)"
    m = "Waiting(deployment='Router-m', needed=(('CPU', 0.1), ('GPU', 0.5)), num_replicas=2)"
    assert before == f"[{m}, {n}]"
    assert after == f"[{n}]"
