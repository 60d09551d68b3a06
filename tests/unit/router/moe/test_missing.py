"""What becomes of a request when an expert has no live copy: it waits, or goes on and says so.

The oracle is a plain-torch Mixtral layer, one token and one expert at a time, without the lost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralForCausalLM

from cluster.errors import CancelledRequestError, DeadlineExceededError, ExpertUnavailableError
from cluster.placement.placement import empty_placement
from cluster.spec import ModelExperts
from cluster.transport.base import Call, CallFailure
from experts.families.base import GateSpec
from router.engine.scheduling.scheduler import Limits
from router.messages.request import GenerationRequest, TokenEvent
from router.moe.gate import Choice, Gate
from router.moe.missing import StepMissing
from router.moe.permute import missing_by_layer
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import check_greedy, prompt_of

NUM_EXPERTS, LAYERS, K = 32, 3, 2
"""So many that no short request needs them all."""
Experts = Collection[tuple[int, int]]
ALL_OF_LAYER_1 = [(1, expert_id) for expert_id in range(NUM_EXPERTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path, num_local_experts=NUM_EXPERTS)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )


@pytest.fixture
def cluster(folder: Path) -> Iterator[LocalCluster]:
    with closing(LocalCluster(folder)) as cluster:
        yield cluster


@pytest.fixture
def stepped(folder: Path) -> LocalCluster:
    return LocalCluster(folder, limits=Limits(8, 64, 16), threaded=False)


def chosen_without(
    probabilities: list[float], lost: Collection[int], k: int, contract: str
) -> dict[int, float]:
    """The oracle's choice of one token: the weight of each expert, by its id."""
    order = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])
    if contract == "next_expert":
        chosen = [e for e in order if e not in lost][:k]
    else:
        chosen = [e for e in order[:k] if e not in lost]
    total = sum(probabilities[e] for e in chosen)
    return {e: probabilities[e] / total for e in chosen}


class BlockWithout(nn.Module):
    """A Mixtral layer's mixture without the lost experts, in the plainest torch."""

    def __init__(self, block: Any, lost: Collection[int], contract: str) -> None:
        super().__init__()
        self.block, self.lost, self.contract = block, lost, contract

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        for place in np.ndindex(*hidden_states.shape[:-1]):
            token = hidden_states[place]
            probabilities = (self.block.gate.weight @ token).softmax(-1).tolist()
            chosen = chosen_without(probabilities, self.lost, K, self.contract)
            for expert_id, weight in chosen.items():
                gate, up = (self.block.experts.gate_up_proj[expert_id] @ token).chunk(2)
                inner = nn.functional.silu(gate) * up
                output[place] += weight * (self.block.experts.down_proj[expert_id] @ inner)
        return output


@torch.inference_mode()
def assert_greedy_without(
    plain: MixtralForCausalLM,
    prompt: list[int],
    event: TokenEvent,
    count: int,
    lost: Experts,
    contract: str,
) -> None:
    """The model without the lost experts chooses each token after the tokens before it."""
    model: Any = copy.deepcopy(plain)
    for layer_id, layer in enumerate(model.model.layers):
        gone = [expert_id for of, expert_id in lost if of == layer_id]
        layer.mlp = BlockWithout(layer.mlp, gone, contract)
    logits = model(torch.tensor([[*prompt, *event.token_ids]]), use_cache=False).logits[0]
    assert list(event.token_ids) == logits[-count - 1 : -1].argmax(-1).tolist()


@cache
def needed(folder: Path, prompt: tuple[int, ...], count: int) -> set[tuple[int, int]]:
    """The (layer, expert) that a prompt and its tokens choose while all are there."""
    with closing(LocalCluster(folder)) as cluster:
        cluster.generate(greedy_request("r", list(prompt), count))
    return {(f.layer_id, e) for f in cluster.transport.frames for e in f.expert_ids}


def step(cluster: LocalCluster) -> int:
    """Do what the engine's thread does once, without its waiting; returns the works done."""
    cluster.engine._commands.run(0.0)
    cluster.engine._expire()
    cluster.engine._unpark()
    work = cluster.scheduler.schedule()
    if work:
        cluster.engine._isolation.compute(work)
    cluster.engine._flush()
    return len(work)


def go_on(cluster: LocalCluster) -> int:
    """Do steps until nothing can be done; returns the most works of a step."""
    return max(iter(partial(step, cluster), 0), default=0)


def tokens_of(cluster: LocalCluster, request_id: str) -> list[int]:
    events = [o for o in cluster.wait(request_id, lambda _: True) if isinstance(o, TokenEvent)]
    return [token_id for event in events for token_id in event.token_ids]


GATE = Gate(GateSpec(renormalises=True), K, lambda hidden_states: hidden_states)


def test_lost_experts_by_layer() -> None:
    models = [ModelExperts("m", (0, 2), 3, 1), ModelExperts("other", (0,), 3, 1)]
    placement = empty_placement(1, models)
    keys = [k for k in placement.holders if k not in [("m", 2, 1), ("other", 0, 0)]]
    lost = missing_by_layer(placement.with_actor("a", 1, keys), "m")
    assert {layer_id: mask.tolist() for layer_id, mask in lost.items()} == {2: [False, True, False]}


@settings(max_examples=200)
@given(data=st.data())
def test_a_steps_choices_are_the_oracles(data: st.DataObject) -> None:
    contracts = data.draw(
        st.lists(st.sampled_from(["strict", "next_expert", "drop"]), min_size=1, max_size=5)
    )
    sizes = [data.draw(st.integers(1, 3)) for _ in contracts]
    lost = np.array(data.draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    seed = data.draw(st.integers(0, 1000))
    hidden = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        ids, weights = GATE.choose(hidden)
        own = Choice(ids.numpy(), weights)
        loss = StepMissing(sizes, contracts)
        mask = lost if lost.any() else None
        got = loss.choose(7, mask, own, partial(GATE.choose_anew, hidden))
    gone = set(np.flatnonzero(lost).tolist())
    computed = set(range(ids.numel())) if got.pairs is None else set(got.pairs.tolist())
    row = 0
    for place, (contract, size) in enumerate(zip(contracts, sizes, strict=True)):
        rows = range(row, row + size)
        row += size
        wanted = {int(e) for r in rows for e in ids[r]} & gone
        if wanted and (contract == "strict" or (contract == "next_expert" and lost.all())):
            assert loss.awaited[place] == {(7, e) for e in wanted}
            assert not computed & {r * K + rank for r in rows for rank in range(K)}
            continue
        assert place not in loss.awaited
        assert (place in loss.inexact) == bool(wanted)
        for r in rows:
            pairs = [rank for rank in range(K) if r * K + rank in computed]
            choice = {int(got.ids[r, rank]): float(got.weights[r, rank]) for rank in pairs}
            if not wanted & {int(e) for e in ids[r]}:
                assert got.ids[r].tolist() == ids[r].tolist()
                assert torch.equal(got.weights[r], weights[r])  # bit for bit
            expected = chosen_without(hidden[r].softmax(-1).tolist(), gone, K, contract)
            assert choice == pytest.approx(expected)
    assert not got.weights.isnan().any()


@pytest.mark.parametrize("contract", ["next_expert", "drop"])
@pytest.mark.parametrize("which", ["one", "many", "layer"])
def test_tokens_without_experts_are_the_oracles(
    folder: Path, plain: MixtralForCausalLM, cluster: LocalCluster, contract: str, which: str
) -> None:
    prompt = prompt_of(7, 1)
    uses = needed(folder, tuple(prompt), 8)
    lost = {
        "one": [max(uses)],
        "many": [(layer, e) for layer in range(LAYERS) for e in range(0, NUM_EXPERTS, 2)],
        # All but one of a layer: there are fewer than K in line.
        "layer": ALL_OF_LAYER_1[1:],
    }[which]
    cluster.lose(lost)
    request = greedy_request("r", prompt, 8, on_expert_loss=contract)
    [[event]] = cluster.generate(request)
    assert_greedy_without(plain, prompt, event, 8, lost, contract)
    assert not event.exact
    assert set(cluster.engine.inexact_rows) == {contract}
    asked = {(f.layer_id, e) for f in cluster.transport.frames for e in f.expert_ids}
    assert not asked & set(lost)


@pytest.mark.parametrize("contract", ["strict", "next_expert", "drop"])
def test_an_expert_that_nobody_needs_is_no_loss(
    folder: Path, plain: MixtralForCausalLM, cluster: LocalCluster, contract: str
) -> None:
    prompt = prompt_of(7, 1)
    uses = needed(folder, tuple(prompt), 8)
    cluster.lose([(0, e) for e in range(NUM_EXPERTS) if (0, e) not in uses])
    [[event]] = cluster.generate(greedy_request("r", prompt, 8, on_expert_loss=contract))
    check_greedy(event.token_ids, plain, prompt, 8)
    assert event.exact
    assert not cluster.engine.inexact_rows


def test_a_layer_without_any_expert_is_passed_by_under_drop_and_waited_for_otherwise(
    plain: MixtralForCausalLM, cluster: LocalCluster
) -> None:
    prompt = prompt_of(7, 1)
    cluster.lose(ALL_OF_LAYER_1)
    waiting = [greedy_request(c, prompt, 8, on_expert_loss=c) for c in ("strict", "next_expert")]
    for request in waiting:
        cluster.engine.submit(request)
    [[event]] = cluster.generate(greedy_request("drop", prompt, 8, on_expert_loss="drop"))
    assert_greedy_without(plain, prompt, event, 8, ALL_OF_LAYER_1, "drop")
    assert tokens_of(cluster, "strict") == tokens_of(cluster, "next_expert") == []
    cluster.lose([])
    for request in waiting:
        check_exact(cluster, plain, request)


def check_exact(
    cluster: LocalCluster, plain: MixtralForCausalLM, request: GenerationRequest
) -> None:
    [event] = cluster.result(request)
    count = request.sampling.max_tokens
    check_greedy(event.token_ids, plain, list(request.prompt_token_ids), count)
    assert event.exact


def park(
    cluster: LocalCluster, folder: Path
) -> tuple[GenerationRequest, GenerationRequest, tuple[int, int]]:
    """Have a request park while another one goes on to its end; returns them, and what it awaits.

    It is an expert that only the first needs, and not for its prompt.
    """
    prompt, others = prompt_of(4, 2), prompt_of(4, 3)
    late = needed(folder, tuple(prompt), 12) - needed(folder, tuple(prompt), 1)
    expert = min(late - needed(folder, tuple(others), 6))
    first, other = greedy_request("first", prompt, 12), greedy_request("other", others, 6)
    cluster.lose([expert])
    for request in (first, other):
        cluster.engine.submit(request)
    go_on(cluster)
    assert len(tokens_of(cluster, "other")) == 6
    assert len(tokens_of(cluster, "first")) < 12
    assert [s.awaited for s in cluster.scheduler.running] == [{expert}]
    return first, other, expert


def test_who_needs_the_lost_expert_waits_and_the_others_go_on(
    folder: Path, plain: MixtralForCausalLM, stepped: LocalCluster
) -> None:
    first, other, expert = park(stepped, folder)
    check_exact(stepped, plain, other)
    # Parked: nothing is computed for it, whatever else the placement becomes.
    sent = len(stepped.transport.frames)
    stepped.lose([expert, (2, 0)])
    assert step(stepped) == 0
    assert len(stepped.transport.frames) == sent
    stepped.lose([])
    go_on(stepped)
    check_exact(stepped, plain, first)
    assert stepped.scheduler.num_free_pages == 512


def test_parked_requests_take_no_place_in_the_batch(
    folder: Path, plain: MixtralForCausalLM
) -> None:
    cluster = LocalCluster(folder, limits=Limits(2, 64, 16), threaded=False)
    cluster.lose(ALL_OF_LAYER_1)
    strict = [greedy_request(f"s{i}", prompt_of(4, i), 6) for i in range(3)]
    going = [greedy_request(f"d{i}", prompt_of(4, i), 6, on_expert_loss="drop") for i in range(3)]
    for request in (*strict, *going):
        cluster.engine.submit(request)
    assert go_on(cluster) == 2
    assert [len(tokens_of(cluster, request.request_id)) for request in going] == [6] * 3
    assert [s.request for s in cluster.scheduler.running] == strict
    cluster.lose([])
    assert go_on(cluster) == 2
    for request in strict:
        check_exact(cluster, plain, request)


def test_a_parked_request_can_be_cancelled(folder: Path, stepped: LocalCluster) -> None:
    first, *_ = park(stepped, folder)
    stepped.engine.cancel("first")
    step(stepped)
    with pytest.raises(CancelledRequestError):
        stepped.result(first)
    assert stepped.scheduler.num_free_pages == 512


def test_a_parked_request_ends_at_its_deadline_and_says_what_was_missing(
    cluster: LocalCluster,
) -> None:
    cluster.lose(ALL_OF_LAYER_1)
    request = greedy_request("r", prompt_of(4, 2), 5, timeout_s=0.3, n=2, temperature=1.0)
    with pytest.raises(ExpertUnavailableError, match=r"expert \d+ of layer 1 .*no live copy") as e:
        cluster.generate(request)
    assert e.value.retry_after_s
    assert not isinstance(e.value, DeadlineExceededError)
    assert cluster.scheduler.num_free_pages == 512


def bits_beside(folder: Path, contract: str) -> list[tuple[float, ...]]:
    """The log probabilities of a strict request's tokens beside mates of a contract."""
    cluster = LocalCluster(folder, threaded=False)
    strict = greedy_request("strict", prompt_of(4, 3), 6, logprobs=5)
    mates = [
        greedy_request(f"m{i}", prompt_of(5, 50 + i), 6, on_expert_loss=contract) for i in range(3)
    ]
    for request in (strict, *mates):
        cluster.engine.submit(request)
    go_on(cluster)
    [event] = cluster.result(strict)
    return [(row.logprob, *row.top_logprobs) for row in event.logprobs]


def test_a_strict_requests_bits_do_not_depend_on_its_mates_contracts(folder: Path) -> None:
    alike = [bits_beside(folder, c) for c in ("strict", "next_expert", "drop")]
    assert alike[0] == alike[1] == alike[2]


@pytest.mark.parametrize("contract", ["next_expert", "drop"])
def test_tokens_before_the_loss_stay_exact(
    folder: Path, plain: MixtralForCausalLM, stepped: LocalCluster, contract: str
) -> None:
    prompt = prompt_of(4, 2)
    stepped.engine.submit(greedy_request("r", prompt, 12, on_expert_loss=contract))
    for _ in range(5):
        step(stepped)
    stepped.lose([(1, e) for e in range(0, NUM_EXPERTS, 2)])
    for _ in range(4):
        step(stepped)
    stepped.lose([])
    go_on(stepped)
    events = [o for o in stepped.wait("r", lambda _: True) if isinstance(o, TokenEvent)]
    flags = [event.exact for event in events]
    first = flags.index(False)
    assert 5 <= first <= 8
    assert not any(flags[first:])  # what came from it is in the cache for good
    exact = [token_id for event in events[:first] for token_id in event.token_ids]
    check_greedy(exact, plain, prompt, first)


@pytest.mark.parametrize("number", [1, 2, 30])
def test_an_actor_that_dies_in_the_middle_of_a_layer(
    plain: MixtralForCausalLM, cluster: LocalCluster, number: int
) -> None:
    """From the frame of this number on an actor is dead, and the placement says so."""
    prompt = prompt_of(6, 4)

    def fail(call: Call, at: int) -> CallFailure | None:
        if at < number or call.actor_id != "a1":
            return None
        cluster.view.publish(cluster.placement.without("a1"))
        return CallFailure.DIED

    cluster.transport.fail = fail
    strict = greedy_request("strict", prompt, 10)
    cluster.engine.submit(strict)
    going = [greedy_request(c, prompt, 10, on_expert_loss=c) for c in ("next_expert", "drop")]
    for [event] in cluster.generate(*going):
        assert len(event.token_ids) == 10
        assert not event.exact
    assert len(tokens_of(cluster, "strict")) < 10
    cluster.transport.fail = lambda call, number: None
    back = cluster.placement.without("a1").with_actor("a1", 2, cluster.placement.holders)
    cluster.view.publish(back)
    assert math.isfinite(sum(cluster.engine.tally.latest_layers_s))
    for bank in cluster.transport.banks.values():  # a successor may hold what it likes
        for other in cluster.transport.banks.values():
            for key, expert in other.experts.items():
                bank.hold(key, expert)
    check_exact(cluster, plain, strict)
