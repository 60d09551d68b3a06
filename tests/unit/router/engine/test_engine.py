"""The engine against transformers: same tokens, alone, in a crowd, and through failures."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM, PreTrainedModel

from cluster.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ExpertUnavailableError,
    OverloadedError,
)
from cluster.transport.base import CallFailure
from router.engine import commands
from router.engine.scheduling.scheduler import Limits
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import LocalCluster, greedy_request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path)
    return path


@pytest.fixture(scope="module")
def oracle(folder: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )


@pytest.fixture
def cluster(folder: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(folder)
    yield cluster
    cluster.close()


def prompt_of(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1, VOCAB_SIZE) for _ in range(length)]


def check_greedy(
    tokens: Sequence[int], oracle: PreTrainedModel, prompt: Sequence[int], count: int
) -> None:
    """Check that ``tokens`` are the ``count`` that transformers would generate greedily.

    One pass tells it: each token is the likeliest one after the prompt and the tokens before it.
    """
    assert len(tokens) == count
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits
    assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == list(tokens)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_greedy_tokens_equal_transformers(
    cluster: LocalCluster, oracle: MixtralForCausalLM, length: int
) -> None:
    prompt = prompt_of(length, length)
    [[event]] = cluster.generate(greedy_request("r", prompt, 20))
    check_greedy(event.token_ids, oracle, prompt, 20)
    assert event.finish_reason == "length"


def test_a_crowd_of_mixed_lengths_gets_the_tokens_that_each_gets_alone(
    cluster: LocalCluster, oracle: MixtralForCausalLM
) -> None:
    sizes = [(1 + (7 * i) % 90, 1 + (5 * i) % 30) for i in range(32)]
    requests = [
        greedy_request(f"r{i}", prompt_of(length, i), count)
        for i, (length, count) in enumerate(sizes)
    ]
    for request, (_, count), [event] in zip(
        requests, sizes, cluster.generate(*requests), strict=True
    ):
        check_greedy(event.token_ids, oracle, request.prompt_token_ids, count)
    assert cluster.scheduler.num_free_pages == 512


def test_a_prompt_longer_than_the_step_budget_is_prefilled_in_chunks(
    folder: Path, oracle: MixtralForCausalLM
) -> None:
    cluster = LocalCluster(folder, limits=Limits(4, 16, 16))
    prompt = prompt_of(120, 3)
    [[event]] = cluster.generate(greedy_request("r", prompt, 8))
    assert max(frame.num_rows for frame in cluster.transport.frames) <= 16 * 2
    check_greedy(event.token_ids, oracle, prompt, 8)
    cluster.close()


def test_a_long_prompt_does_not_stall_a_decoding_request(folder: Path) -> None:
    cluster = LocalCluster(folder, limits=Limits(4, 8, 16), threaded=False)
    first, long = greedy_request("a", prompt_of(3, 1), 40), greedy_request("b", prompt_of(90, 2), 2)
    for request in (first, long):
        cluster.scheduler.add(request)
    for _ in range(10):
        cluster.engine.step(cluster.scheduler.schedule())
    decoding, prefilling = cluster.scheduler.running
    assert decoding.num_generated == 10
    assert 0 < prefilling.num_computed < 90


@pytest.mark.parametrize("num_actors", [1, 3, 8])
def test_tokens_do_not_depend_on_the_number_of_actors(
    folder: Path, oracle: MixtralForCausalLM, num_actors: int
) -> None:
    cluster = LocalCluster(folder, num_actors=num_actors)
    prompt = prompt_of(10, 4)
    [[event]] = cluster.generate(greedy_request("r", prompt, 12))
    check_greedy(event.token_ids, oracle, prompt, 12)
    cluster.close()


def test_only_the_chosen_experts_run(cluster: LocalCluster) -> None:
    cluster.generate(greedy_request("r", prompt_of(10, 5), 6))
    computed = sum(sum(bank.tokens.values()) for bank in cluster.transport.banks.values())
    tokens = 10 + 6 - 1  # the last sampled token is never computed
    # Two experts of a token in two layers; in the last only of the tokens that are sampled from.
    assert computed == 2 * (tokens * 2 + 6)


def test_sliding_windows_are_honoured(tmp_path: Path) -> None:
    oracle = save_mixtral(tmp_path, sliding_window=12)
    cluster = LocalCluster(tmp_path, limits=Limits(4, 16, 16))
    prompts = [prompt_of(40, 6), prompt_of(5, 7)]
    requests = [greedy_request(f"r{i}", p, 20) for i, p in enumerate(prompts)]
    for prompt, [event] in zip(prompts, cluster.generate(*requests), strict=True):
        check_greedy(event.token_ids, oracle, prompt, 20)
    cluster.close()


def test_a_sequence_ends_at_the_end_of_sequence_token_unless_told_to_ignore_it(
    cluster: LocalCluster,
) -> None:
    request = greedy_request("r", prompt_of(6, 8), 12)
    [[event]] = cluster.generate(request)
    cluster.engine._eos_token_ids = frozenset([event.token_ids[4]])
    first = event.token_ids.index(event.token_ids[4])
    [[stopped]] = cluster.generate(greedy_request("s", prompt_of(6, 8), 12, ignore_eos=False))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == event.token_ids[: first + 1]
    [[ignored]] = cluster.generate(greedy_request("t", prompt_of(6, 8), 12))
    assert ignored.token_ids == event.token_ids


def test_sampled_tokens_depend_on_the_seed_and_not_on_batch_mates(cluster: LocalCluster) -> None:
    def sampled(request_id: str, seed: int, n: int = 1) -> list[tuple[int, ...]]:
        request = greedy_request(request_id, prompt_of(8, 9), 10, temperature=1.0, seed=seed, n=n)
        cluster.engine.submit(request)
        return [event.token_ids for event in cluster.result(request)]

    [alone] = sampled("alone", 7)
    mates = [greedy_request(f"m{i}", prompt_of(20 + i, i), 10) for i in range(8)]
    for mate in mates:
        cluster.engine.submit(mate)
    crowd = sampled("crowd", 7, n=3)
    assert crowd[0] == alone
    assert len(set(crowd)) == 3
    assert sampled("other", 8) != [alone]


def test_logprobs_equal_transformers(cluster: LocalCluster, oracle: MixtralForCausalLM) -> None:
    prompt = prompt_of(9, 10)
    [[event]] = cluster.generate(greedy_request("r", prompt, 4, logprobs=3))
    ids = torch.tensor([prompt + list(event.token_ids)])
    expected = oracle(ids).logits[0].log_softmax(-1)
    for i, row in enumerate(event.logprobs):
        position = expected[len(prompt) - 1 + i]
        assert row.logprob == pytest.approx(float(position[event.token_ids[i]]), abs=1e-4)
        top = position.topk(3)
        assert row.top_ids == tuple(top.indices.tolist())
        assert row.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


def test_cancelling_frees_the_request_and_leaves_the_others(
    cluster: LocalCluster, oracle: MixtralForCausalLM
) -> None:
    doomed, other = (
        greedy_request("d", prompt_of(5, 1), 200),
        greedy_request("o", prompt_of(5, 2), 20),
    )
    cluster.engine.submit(doomed)
    cluster.engine.submit(other)
    cluster.wait("d", lambda outcomes: len(outcomes) >= 2)
    cluster.engine.cancel("d")
    with pytest.raises(CancelledRequestError):
        cluster.result(doomed)
    [event] = cluster.result(other)
    check_greedy(event.token_ids, oracle, prompt_of(5, 2), 20)
    assert cluster.scheduler.num_free_pages == 512


def test_stopping_one_choice_leaves_the_other_choices(cluster: LocalCluster) -> None:
    request = greedy_request("r", prompt_of(5, 1), 100, n=2, temperature=1.0, seed=1)
    cluster.engine.submit(request)
    cluster.wait("r", lambda outcomes: len(outcomes) >= 6)
    cluster.engine.stop_choice("r", 1)
    first, second = cluster.result(request)
    assert (first.finish_reason, len(first.token_ids)) == ("length", 100)
    assert second.finish_reason == "stop"
    assert len(second.token_ids) < 100


def test_a_passed_deadline_ends_a_request_and_no_other(cluster: LocalCluster) -> None:
    late = greedy_request("late", prompt_of(5, 1), 200, timeout_s=-1)
    good = greedy_request("good", prompt_of(5, 2), 5)
    cluster.engine.submit(late)
    cluster.engine.submit(good)
    with pytest.raises(DeadlineExceededError):
        cluster.result(late)
    assert len(cluster.result(good)[0].token_ids) == 5


def test_a_full_queue_refuses_the_next_request_and_serves_the_rest(folder: Path) -> None:
    cluster = LocalCluster(folder, limits=Limits(1, 16, 2), threaded=False)
    requests = [greedy_request(f"r{i}", prompt_of(5, i), 3) for i in range(4)]
    for request in requests:
        cluster.engine.submit(request)
    cluster.engine.start()
    outcomes: list[bool] = []
    for request in requests:
        try:
            outcomes.append(len(cluster.result(request)[0].token_ids) == 3)
        except OverloadedError:
            outcomes.append(False)
    assert outcomes == [True, True, False, False]
    cluster.close()


def test_the_thread_has_ended_when_the_engine_is_closed(folder: Path) -> None:
    cluster = LocalCluster(folder)
    cluster.engine.submit(greedy_request("r", prompt_of(5, 1), 40))
    cluster.wait("r", bool)
    cluster.engine.close()
    assert not cluster.engine.is_alive()


def test_a_request_larger_than_the_cache_is_refused(folder: Path) -> None:
    cluster = LocalCluster(folder, cache_tokens=64)
    with pytest.raises(OverloadedError, match="70 cache tokens"):
        cluster.generate(greedy_request("r", prompt_of(60, 1), 10))
    cluster.close()


def test_requests_wait_for_cache_pages_and_are_all_served(folder: Path) -> None:
    cluster = LocalCluster(folder, cache_tokens=128)
    requests = [greedy_request(f"r{i}", prompt_of(20, i), 30) for i in range(6)]
    results = cluster.generate(*requests)
    assert [len(event.token_ids) for [event] in results] == [30] * 6
    assert cluster.scheduler.num_free_pages == 8
    cluster.close()


@pytest.mark.parametrize("failure", [CallFailure.DIED, CallFailure.TIMED_OUT, b"garbage"])
def test_lost_calls_are_retried_and_change_no_token(
    cluster: LocalCluster, oracle: MixtralForCausalLM, failure: CallFailure | bytes
) -> None:
    cluster.transport.fail = lambda call, number: failure if number % 5 == 0 else None
    prompt = prompt_of(12, 11)
    [[event]] = cluster.generate(greedy_request("r", prompt, 10))
    check_greedy(event.token_ids, oracle, prompt, 10)
    assert sum(cluster.dispatcher.retries.values()) > 10
    assert bool(cluster.suspected) == isinstance(failure, CallFailure)


def test_an_expert_without_a_copy_is_waited_for(
    cluster: LocalCluster, oracle: MixtralForCausalLM
) -> None:
    gone = cluster.placement.without("a1")
    cluster.view.publish(gone)
    prompt = prompt_of(12, 12)
    request = greedy_request("r", prompt, 10)
    cluster.engine.submit(request)
    cluster.wait("r", lambda outcomes: not outcomes)
    keys = [k for k, actors in cluster.placement.holders.items() if "a1" in actors]
    cluster.view.publish(gone.with_actor("a1", 2, keys))
    [event] = cluster.result(request)
    check_greedy(event.token_ids, oracle, prompt, 10)


def test_an_expert_that_stays_away_ends_only_the_requests_whose_deadline_passes(
    cluster: LocalCluster, oracle: MixtralForCausalLM
) -> None:
    gone = cluster.placement.without("a1")
    cluster.view.publish(gone)
    hasty = greedy_request("hasty", prompt_of(12, 13), 10, timeout_s=0.5)
    patient = greedy_request("patient", prompt_of(12, 14), 10)
    cluster.engine.submit(patient)
    cluster.engine.submit(hasty)
    started_s = time.monotonic()
    with pytest.raises(ExpertUnavailableError) as caught:
        cluster.result(hasty)
    assert time.monotonic() - started_s < 30
    assert caught.value.retry_after_s
    keys = [k for k, actors in cluster.placement.holders.items() if "a1" in actors]
    cluster.view.publish(gone.with_actor("a1", 2, keys))
    [event] = cluster.result(patient)
    check_greedy(event.token_ids, oracle, prompt_of(12, 14), 10)


def test_a_step_without_memory_is_refused_and_the_next_request_is_served(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("the device is out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cluster.model.decoder, "forward", full)
        with pytest.raises(OverloadedError, match="out of memory for a step") as caught:
            cluster.generate(greedy_request("r", prompt_of(5, 1), 3))
    assert caught.value.field == "args.router.max_batch_tokens"
    assert len(cluster.generate(greedy_request("s", prompt_of(5, 1), 3))[0][0].token_ids) == 3


def test_an_idle_engine_computes_the_prompts_of_a_burst_in_one_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "QUIET_S", 30.0)
    monkeypatch.setattr(commands, "GATHER_S", 30.0)
    cluster = LocalCluster(folder, threaded=False)
    engine, scheduler = cluster.engine, cluster.scheduler
    for name in ("a", "b"):
        engine.submit(greedy_request(name, prompt_of(4, ord(name)), 2))
    engine._take_commands(has_works=False)
    assert len(scheduler.sequences()) == 2
    while chunks := scheduler.schedule():
        engine._traced_step(chunks)
    assert not scheduler.sequences()
    engine._commands.note_step(1, 30.0)  # so long the next one may take
    engine.submit(greedy_request("c", prompt_of(4, 3), 2))
    late = threading.Timer(0.05, engine.submit, [greedy_request("d", prompt_of(4, 4), 2)])
    late.start()
    engine._take_commands(has_works=False)
    assert [work.sequence.request.request_id for work in scheduler.schedule()] == ["c", "d"]
    late.join(30.0)
    cluster.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_alone_gets_the_logits_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    save_mixtral(tmp_path, dtype=dtype)
    own, exact = (
        MixtralForCausalLM.from_pretrained(
            tmp_path, dtype=kind, attn_implementation="sdpa", experts_implementation="eager"
        )
        for kind in (dtype, torch.float32)
    )
    cluster = LocalCluster(tmp_path)
    error, allowed = 0.0, 1e-5
    for seed in range(8):
        prompt = prompt_of(12, seed)
        [[event]] = cluster.generate(greedy_request(f"r{seed}", prompt, 1, logprobs=VOCAB_SIZE))
        with torch.inference_mode():
            theirs, right = (
                model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
                for model in (own, exact)
            )
        got = torch.tensor(event.logprobs[0].top_logprobs)
        # In bf16 transformers' own logits are off by roundings too.
        allowed = max(allowed, float((theirs - right).abs().max()))
        error = max(error, float((got - right.sort(descending=True).values).abs().max()))
        if dtype == torch.float32:
            assert event.token_ids[0] == int(theirs.argmax())
        assert right[event.token_ids[0]] >= right.max() - 2 * allowed
    assert error <= allowed
    cluster.close()
