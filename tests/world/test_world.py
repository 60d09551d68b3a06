"""Past worlds break no law any more, and a seed is a world."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch

from router.engine.scheduling.prefixes import Prefixes
from router.engine.sequence import Sequence
from tests.world.clients import Answer, Plan
from tests.world.kernel import Kernel, Thread, current_process, kernel
from tests.world.locks import Condition, Event, Lock, SimpleQueue
from tests.world.many import HASH_SEED, all_of, judged
from tests.world.model import VOCAB, tokens_of
from tests.world.network import Address, Listener, Network
from tests.world.past_seeds import FOLDER, STORIES
from tests.world.past_seeds import scenario as past_scenario
from tests.world.sockets import Selector, Socket
from tests.world.weather import Event as Happening
from tests.world.weather import Scenario, Setting, draw
from tests.world.world import run

ROOT = Path(__file__).parents[2]
TELL = """
import json, sys
import ray
from tests.world.many import prepare
from tests.world.weather import draw
from tests.world.world import run
prepare()
told = []
for seed in map(int, sys.argv[1:]):
    outcome = run(draw(seed))
    answers = [[c.token_ids for c in a.choices] + [a.error, a.ended_at_s] for a in outcome.answers]
    told.append([outcome.trace, outcome.digest, outcome.num_callbacks, answers])
assert not ray.is_initialized()
print(json.dumps(told))
"""


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_a_seed_draws_one_scenario_which_is_the_same_after_it_was_a_file(seed: int) -> None:
    drawn = draw(seed)
    assert drawn == draw(seed) != draw(seed + 1)
    assert Scenario.from_json(json.loads(json.dumps(drawn.to_json()))) == drawn


def test_weights_prompts_and_places_all_change_the_tokens() -> None:
    found = {tokens_of(*of, 8) for of in [("a", (1, 2)), ("b", (1, 2)), ("a", (2, 1)), ("a", (1,))]}
    assert len(found) == 4
    first = tokens_of("a", (1, 2), 8)
    assert tokens_of("a", (1, 2, *first[:3]), 5) == first[3:]


def test_no_seed_begins_after_the_time_and_a_run_that_raises_or_does_not_end_is_a_breach() -> None:
    for scenario, limit_s, told in (
        (Scenario(1, Setting(), ()), 60.0, "ValueError"),
        (draw(1), 0.05, "took more than 0.05 s"),
    ):
        [(law, _, text)] = judged(scenario, limit_s).breaches
        assert (law, told in text) == ("the world runs", True)
    no_pool: Any = None  # nothing is submitted
    assert [*all_of(no_pool, 2, iter(range(5)), perf_counter() - 1.0)] == []


@pytest.mark.parametrize("name", STORIES)
def test_what_once_broke_a_law_breaks_none(name: str) -> None:
    assert judged(past_scenario(name)).breaches == ()


def test_each_past_scenario_has_its_story() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == set(STORIES)


OTHER_MACHINE = {
    "PYTHONMALLOC": "malloc",  # objects have other addresses, and sets of them another order
    "NPY_DISABLE_CPU_FEATURES": " ".join(np.show_config(mode="dicts")["SIMD Extensions"]["found"]),
    "ATEN_CPU_CAPABILITY": "default",
    "OMP_NUM_THREADS": "1",
}
"""Objects lie elsewhere, and numpy and torch compute as on the oldest processor they run on."""


def telling(*seeds: int, **settings: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", TELL, *map(str, seeds)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": HASH_SEED, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def told(process: subprocess.Popen[bytes]) -> list[str]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return [json.dumps(one) for one in json.loads(output)]


@pytest.mark.timeout(600)
def test_a_seed_is_the_same_world_on_every_machine_whatever_ran_before() -> None:
    with telling(7) as alone, telling(5, 7, **OTHER_MACHINE) as after_another:
        [first] = told(alone)
        other, second = told(after_another)
    assert first == second
    assert first.count(",") > 100
    assert first != other


CALM = [
    Plan(3.0, 0, (5,), 1, 10.0),
    Plan(3.1, 1, (1, 2, 3, 4, 5, 6, 7), 11, 10.0, n=2),
    Plan(3.1, 2, tuple(range(40)), 8, 10.0, is_streamed=False),
    Plan(3.1, 3, (VOCAB - 1, 0), 6, 10.0, on_expert_loss="next_expert"),
    Plan(3.2, 4, (9, 9, 9), 5, 10.0, on_expert_loss="drop", priority=1),
    Plan(3.2, 5, (8, 8), 9, 10.0, cancel_after=3),
]


@pytest.mark.parametrize("transport", ["stream", "ray"])
def test_a_calm_world_generates_what_the_plain_oracle_does(transport: str) -> None:
    outcome = run(Scenario(1, Setting(transport=transport), tuple(CALM)))
    assert outcome.breaches == []
    assert outcome.hit == []
    *whole, cancelled = sorted(outcome.answers, key=lambda answer: answer.plan.client)
    for answer in whole:
        assert tokens(answer) == [right(answer)] * answer.plan.n
        assert {c.finish_reason for c in answer.choices} == {"length"}
    [got] = tokens(cancelled)
    assert cancelled.is_cancelled
    assert 3 <= len(got) < 9
    assert got == right(cancelled)[: len(got)]


def test_on_one_node_nobody_listens_by_tcp_until_a_router_is_on_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: dict[str, list[float]] = {}
    listen = Network.listen

    def listened(network: Network, address: str | None, name: Address | None) -> Listener:
        made, process = listen(network, address, name), current_process()
        if not isinstance(made.address, bytes):
            assert process is not None
            opened.setdefault(process.name, []).append(kernel().now_s)
        return made

    monkeypatch.setattr(Network, "listen", listened)
    late = tuple(replace(plan, at_s=plan.at_s + 7.0) for plan in CALM[:5])
    setting = Setting(num_nodes=1, transport="stream")
    outcome = run(Scenario(1, setting, (*CALM[:5], *late)))
    assert (outcome.breaches, opened) == ([], {})

    moves = (Happening(4.0, "node added"), Happening(5.0, "dies", 0, role="router"))
    outcome = run(Scenario(1, setting, (*CALM[:5], *late), moves))
    assert outcome.breaches == []
    assert len(outcome.hit) == 2
    roles = {name.partition("/")[0] for name in opened}
    assert {"gateway", "router"} <= roles, "each knows of the other's node"
    assert min(at_s for times in opened.values() for at_s in times) > 5.0
    for name, times in opened.items():
        assert len(times) == 1, (name, times)
    for answer in outcome.answers:
        assert tokens(answer) == [right(answer)] * answer.plan.n


def tokens(answer: Answer) -> list[tuple[int, ...]]:
    return [tuple(choice.token_ids) for choice in answer.choices]


def right(answer: Answer) -> tuple[int, ...]:
    return tokens_of("a", answer.plan.prompt, answer.plan.max_tokens)


def test_routers_of_a_world_share_pages_and_compute_resumed_tokens_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They do so only where native code computes the experts, so a world's actors must say it."""
    found, at_once = [0], [0]
    skip, append = Prefixes._skip, Sequence.append_forced

    def counted_skip(prefixes: Prefixes, sequence: Sequence, num_pages: int) -> None:
        before = prefixes.hit_tokens
        skip(prefixes, sequence, num_pages)
        found[0] += prefixes.hit_tokens - before

    def counted_append(sequence: Sequence) -> None:
        before = sequence.num_generated
        append(sequence)
        at_once[0] += sequence.num_generated - before

    monkeypatch.setattr(Prefixes, "_skip", counted_skip)
    monkeypatch.setattr(Sequence, "append_forced", counted_append)
    for seed in (12, 17):
        assert run(draw(seed)).breaches == []
    assert found[0] > 100
    assert at_once[0] > 1


@pytest.mark.parametrize("seed", [3, 5], ids=["plain", "with a pool of threads that wait"])
def test_a_world_leaves_nothing_behind(seed: int) -> None:
    """Or what the process imports inside would go on with a world's locks."""
    kinds = (Lock, Condition, Event, SimpleQueue, Thread, Kernel, Socket, Selector)
    before = {name: getattr(time, name) for name in ("monotonic", "time", "sleep")}
    gc.collect()
    earlier = [one for one in gc.get_objects() if isinstance(one, kinds)]
    known = set(map(id, earlier))
    assert run(draw(seed)).num_callbacks > 1000
    for _ in range(3):  # generators that are closed by the first go with the next
        gc.collect()
    left = [
        type(one) for one in gc.get_objects() if isinstance(one, kinds) and id(one) not in known
    ]
    assert left == []
    assert {name: getattr(time, name) for name in before} == before
    assert threading.Lock is not Lock
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
