"""The engine against transformers: same tokens, alone, in a crowd, and through failures."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM, PreTrainedModel

from cluster.errors import CancelledRequestError, OverloadedError
from cluster.transport.base import CallFailure
from router.engine import commands
from router.engine.scheduling.scheduler import Limits
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import OpenCluster


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


def test_greedy_tokens_of_a_crowd_of_mixed_lengths_equal_transformers(
    cluster: LocalCluster, oracle: MixtralForCausalLM
) -> None:
    sizes = [(1 + (7 * i) % 90, 1 + (5 * i) % 30) for i in range(32)]  # 1, 2, 15 to 17, …
    requests = [
        greedy_request(f"r{i}", prompt_of(length, i), count)
        for i, (length, count) in enumerate(sizes)
    ]
    for request, (_, count), [event] in zip(
        requests, sizes, cluster.generate(*requests), strict=True
    ):
        check_greedy(event.token_ids, oracle, request.prompt_token_ids, count)
    assert cluster.scheduler.num_free_pages == 512


def test_only_the_chosen_experts_run(cluster: LocalCluster) -> None:
    cluster.generate(greedy_request("r", prompt_of(10, 5), 6))
    computed = sum(sum(bank.tokens.values()) for bank in cluster.transport.banks.values())
    tokens = 10 + 6 - 1  # the last sampled token is never computed
    # Two experts of a token in two layers; in the last only of the tokens that are sampled from.
    assert computed == 2 * (tokens * 2 + 6)


def test_sliding_windows_are_honoured(open_cluster: OpenCluster, tmp_path: Path) -> None:
    oracle = save_mixtral(tmp_path, sliding_window=12)
    cluster = open_cluster(tmp_path, limits=Limits(4, 16, 16))
    prompts = [prompt_of(40, 6), prompt_of(5, 7)]
    requests = [greedy_request(f"r{i}", p, 20) for i, p in enumerate(prompts)]
    for prompt, [event] in zip(prompts, cluster.generate(*requests), strict=True):
        check_greedy(event.token_ids, oracle, prompt, 20)


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


def test_logprobs_equal_transformers(cluster: LocalCluster, oracle: MixtralForCausalLM) -> None:
    prompt = prompt_of(9, 10)
    [[event]] = cluster.generate(greedy_request("r", prompt, 4, logprobs=3))
    ids = torch.tensor([prompt + list(event.token_ids)])
    with torch.inference_mode():
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
    doomed = greedy_request("d", prompt_of(5, 1), 200)
    other = greedy_request("o", prompt_of(5, 2), 20)
    for request in (doomed, other):
        cluster.engine.submit(request)
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


def test_the_thread_has_ended_when_the_engine_is_closed(cluster: LocalCluster) -> None:
    cluster.engine.submit(greedy_request("r", prompt_of(5, 1), 40))
    cluster.wait("r", bool)
    cluster.engine.close()
    assert not cluster.engine.is_alive()


def test_a_request_larger_than_the_cache_is_refused(open_cluster: OpenCluster) -> None:
    with pytest.raises(OverloadedError, match="70 cache tokens"):
        open_cluster(cache_tokens=64).generate(greedy_request("r", prompt_of(60, 1), 10))


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
    open_cluster: OpenCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "QUIET_S", 30.0)
    monkeypatch.setattr(commands, "GATHER_S", 30.0)
    cluster = open_cluster(threaded=False)
    engine, scheduler = cluster.engine, cluster.scheduler
    for name in ("a", "b"):
        engine.submit(greedy_request(name, prompt_of(4, ord(name)), 2))
    engine._take_commands(has_chunks=False)
    assert len(scheduler.sequences()) == 2
    while chunks := scheduler.schedule():
        engine._traced_step(chunks)
    assert not scheduler.sequences()
    engine._commands.note_step(1, 30.0)  # so long the next one may take
    engine.submit(greedy_request("c", prompt_of(4, 3), 2))
    late = threading.Timer(0.05, engine.submit, [greedy_request("d", prompt_of(4, 4), 2)])
    late.start()
    engine._take_commands(has_chunks=False)
    assert [work.sequence.request.request_id for work in scheduler.schedule()] == ["c", "d"]
    late.join(30.0)
