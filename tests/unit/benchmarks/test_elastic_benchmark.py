"""The pure parts of the benchmark of elasticity: Zipf's load, what is made of looks, verdicts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

import router.client
from benchmarks import elastic, load_step, steered
from benchmarks.devices import Product
from benchmarks.load_step import Look
from benchmarks.serve_clients import Ports
from cluster.reports import DeviceStatus, ExpertLoad, LoadStatus
from router.client import Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MixtralForCausalLM:
    folder = tmp_path_factory.mktemp("steered")
    steered.save(folder)
    return MixtralForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("first", [steered.own_token(5), steered.zipf_token(40)])
def test_transformers_sends_steered_tokens_to_the_experts_that_are_meant(
    model: MixtralForCausalLM, first: int
) -> None:
    tokens = [first, *load_step.expected(first, 14)]
    output = model(torch.tensor([tokens]), output_router_logits=True)
    for layer, logits in enumerate(output.router_logits):
        assert logits.argmax(dim=1).tolist() == [steered.expert_of(layer, t) for t in tokens]
    assert output.logits[0].argmax(dim=1).tolist()[:-1] == tokens[1:]


def test_a_rate_is_of_the_tokens_between_the_first_and_the_last_piece() -> None:
    arrivals = [(0.5, 9), (1.0, 1), (2.0, 2), (3.0, 2), (9.0, 9)]
    assert elastic.rate(arrivals, 0.9, 5.0) == pytest.approx(4 / 2)
    assert elastic.rate(arrivals, 8.0, 10.0) == 0.0
    assert elastic.rate([], 0.0, 1.0) == 0.0


@pytest.mark.parametrize(
    ("total", "kinds", "expected"),
    [(16, 8, [6, 3, 2, 1, 1, 1, 1, 1]), (3, 2, [2, 1]), (5, 1, [5]), (0, 3, [0, 0, 0])],
)
def test_kinds_are_as_frequent_as_zipf_says(total: int, kinds: int, expected: list[int]) -> None:
    assert steered.zipf_numbers(total, kinds) == expected


def test_zipfs_cycle_has_experts_as_often_as_zipf_says_and_one_first_actor() -> None:
    cycle = load_step.expected(steered.zipf_token(0), steered.ZIPF_CYCLE)
    assert sorted(cycle) == list(range(steered.ZIPF_BEGIN, steered.VOCAB))
    ranks = []
    for layer in range(steered.LAYERS):
        # Expert e of layer l begins at actor (e + l) mod A.
        actors = [(steered.expert_of(layer, token) + layer) % steered.EXPERTS for token in cycle]
        assert [actors.count(rank) for rank in range(steered.EXPERTS)] == steered.zipf_numbers(
            steered.ZIPF_CYCLE, steered.EXPERTS
        )
        ranks.append(actors)
    assert ranks[0] != ranks[1]


class Answering:
    """A client's deployment: says what must come, or what ``said`` makes of it."""

    said = staticmethod(lambda tokens: tokens)

    def __init__(self, address: str, retry: None) -> None: ...

    def close(self) -> None: ...

    def stream(self, prompt: list[int], sampling: Sampling, **_: object) -> Iterator[Any]:
        for token in self.said(load_step.expected(prompt[0], sampling.max_tokens)):
            yield SimpleNamespace(exact=False, token_ids=(token,))


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[load_step.Clients]:
    monkeypatch.setattr(router.client, "Client", Answering)
    found = load_step.Clients(Ports(1, 2), 10_000)
    yield found
    found.close()


def test_a_client_that_leaves_ends_its_answer_and_has_not_failed(
    clients: load_step.Clients,
) -> None:
    leaving = threading.Event()
    leaving.set()
    clients._ask(steered.zipf_token(0), leaving)
    assert [one.tokens for one in clients.answers] == [1]
    clients.come([steered.zipf_token(0), steered.own_token(1)])
    clients.leave(2)
    assert clients.failures == []


@pytest.mark.parametrize(
    ("said", "why"),
    [(lambda tokens: [*tokens[:2], 0], "not steered"), (lambda tokens: tokens[:2], "2 tokens")],
)
def test_a_wrong_token_and_a_short_answer_are_failures(
    clients: load_step.Clients, monkeypatch: pytest.MonkeyPatch, said: Any, why: str
) -> None:
    monkeypatch.setattr(Answering, "said", staticmethod(said))
    with pytest.raises(RuntimeError, match=why):
        clients._ask(steered.zipf_token(0), threading.Event())


def test_a_look_tells_who_holds_what() -> None:
    devices = [DeviceStatus(actor, "n", 1, 0.0, 0.0, 0.0) for actor in ("a", "b", "c")]
    experts = (ExpertLoad("m", 0, 1, 0.0, ("a", "b")), ExpertLoad("m", 1, 1, 0.0, ("a",)))
    seen = load_step.look_of(LoadStatus(30.0, 1.0, 1.0, tuple(devices), experts, ()), 7.0)
    assert seen == Look(7.0, frozenset({("a", 0, 1), ("b", 0, 1), ("a", 1, 1)}))
    assert seen.actors == {"a", "b"}
    assert seen.numbers == {"actors": 2, "copies": 3}


def test_a_new_copy_serves_when_it_first_computes_after_the_crowd_came() -> None:
    products = {
        actor: [Product(0, expert, start_s) for expert, start_s in of]
        for actor, of in {
            "a": [(0, 8.0), (0, 10.5), (1, 11.5), (1, 10.9)],
            "b": [(2, 9.5), (0, 10.1)],
            "c": [(0, 14.0), (0, 13.0)],
        }.items()
    }
    before = Look(9.0, frozenset({("a", 0, 0), ("b", 0, 0)}))
    served = load_step.served_after(products, before, 10.0)
    assert served == {"standing": pytest.approx(0.9), "new": pytest.approx(3.0)}
    assert load_step.served_after({"a": []}, before, 10.0) == {"standing": None, "new": None}


def test_actors_are_gone_once_there_are_so_few_for_good() -> None:
    seen = [(1.0, 1), (5.0, 2), (6.0, 1), (7.0, 2), (8.0, 1)]
    assert load_step.gone_after(seen, 1, 4.0) == 4.0
    assert load_step.gone_after(seen, 2, 4.0) == 1.0
    assert load_step.gone_after(seen[:-1], 1, 4.0) is None


def result() -> dict[str, Any]:
    case = {"tokens_per_s": 10.0, "copies": 16}
    step = {
        "answers": 9,
        "failures": [],
        "served_s": {"standing": 1.0, "new": 5.0},
        "gone_s": dict.fromkeys(("actors", "copies"), elastic.TARGETS["downscale_delay_s"]),
        "numbers": {"actors": {"before": 2, "most": 4, "after": 2}},
    }
    return {
        "targets": elastic.TARGETS,
        "zipf": {"one copy": case, "copies follow": {**case, "tokens_per_s": 18.0}},
        "gain": 1.8,
        "steps": {case: deepcopy(step) for case in elastic.STEP_CASES},
    }


def test_what_is_promised_is_kept_at_its_bound() -> None:
    verdicts = elastic.judge(result())
    assert [one.is_kept for one in verdicts] == [True] * 11


@pytest.mark.parametrize(
    ("place", "key", "value", "figure"),
    [
        ((), "gain", 1.79, "throughput"),
        (("steps", "none stands by", "served_s"), "standing", 1.01, "none stands by: a copy"),
        (("steps", "none stands by", "served_s"), "new", 5.01, "none stands by: on one"),
        (("steps", "two stand by", "served_s"), "new", None, "two stand by: on one"),
        (("steps", "two stand by", "gone_s"), "actors", None, "two stand by: its actors"),
        (("steps", "none stands by", "gone_s"), "copies", 10.1, "none stands by: its copies"),
        (("steps", "none stands by"), "failures", ["UnavailableError: no"], "failed"),
    ],
)
def test_what_is_missed_is_said(
    place: tuple[str, ...], key: str, value: object, figure: str
) -> None:
    changed = deepcopy(result())
    part = changed
    for name in place:
        part = part[name]
    part[key] = value
    [missed] = [one for one in elastic.judge(changed) if not one.is_kept]
    assert figure in missed.figure
    assert key != "new" or value is not None or missed.measured == "never"
