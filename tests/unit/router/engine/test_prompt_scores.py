"""Log probabilities of a prompt against transformers, in chunks, in a crowd, after failures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.errors import NotFiniteError
from cluster.native import native
from router.engine import prompt_scores
from router.engine.scheduling.scheduler import Limits
from router.messages.request import GenerationRequest, PromptLogprobs, Received
from tests.checkpoints import VOCAB_SIZE
from tests.grok_oracle import logits_of
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import ALL, FAMILIES, OpenCluster, Saves
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 37
TOP = 3


def asked(name: str, length: int = LENGTH, count: int = 0, **sampling: Any) -> GenerationRequest:
    options = {"prompt_logprobs": TOP, **sampling}
    return greedy_request(name, prompt_of(length, 7), count, **options)


def rows_of(cluster: LocalCluster, request: GenerationRequest) -> tuple[PromptLogprobs, ...]:
    [[event]] = cluster.generate(request)
    assert event.prompt_start == 0
    return event.prompt_logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_those_of_transformers(
    saved: Saves, open_cluster: OpenCluster, family: str
) -> None:
    folder, model = saved(family)
    cluster = open_cluster(folder, limits=Limits(4, 16, 16))  # the prompt takes three steps
    rows = rows_of(cluster, asked("r"))
    ids = torch.tensor([prompt_of(LENGTH, 7)])
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    assert len(rows) == LENGTH - 1
    for place, row in enumerate(rows):
        own = expected[place, ids[0, place + 1]]
        assert row.logprob == pytest.approx(own.item(), abs=1e-4)
        top = expected[place].topk(TOP)
        assert row.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
        assert expected[place, list(row.top_ids)].tolist() == pytest.approx(
            top.values.tolist(), abs=1e-4
        )
        assert abs(row.rank - 1 - int((expected[place] > own).sum())) <= 1


def test_those_of_grok_equal_an_independent_implementation(
    saved: Saves, open_cluster: OpenCluster
) -> None:
    folder, weights = saved("grok")
    rows = rows_of(open_cluster(folder, limits=Limits(4, 16, 16)), asked("r"))
    ids = prompt_of(LENGTH, 7)
    for place in (0, 15, 16, LENGTH - 2):  # it is slow
        expected = logits_of(weights, ids[: place + 1]).log_softmax(-1)
        assert rows[place].logprob == pytest.approx(expected[ids[place + 1]].item(), abs=1e-4)


@pytest.mark.parametrize("dtype", [] if native is None else ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL)
def test_neither_company_nor_chunks_change_a_bit(
    saved: Saves, open_cluster: OpenCluster, family: str, dtype: str
) -> None:
    limits = Limits(32, LENGTH + 3, 64)  # alone, the prompt is one step
    cluster = open_cluster(saved(family).folder, dtype=dtype, limits=limits, prefix_cache=False)
    expected = rows_of(cluster, asked("alone"))
    others = [
        greedy_request(
            f"o{seed}",
            prompt_of(3 + 11 * seed, seed),
            seed,
            prompt_logprobs=None if seed % 2 else seed,
        )
        for seed in range(1, 7)
    ]
    [event] = cluster.generate(*others[:3], asked("r", count=4), *others[3:])[3]
    assert event.prompt_logprobs == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_logits_are_made_a_few_rows_at_a_time(
    saved: Saves, open_cluster: OpenCluster, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    cluster = open_cluster(saved(family).folder)
    whole = rows_of(cluster, asked("whole"))
    sizes = []
    logits = cluster.model.decoder.logits

    def counted(hidden_states: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        made = logits(hidden_states, *rows)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(cluster.model.decoder, "logits", counted)
    monkeypatch.setattr(prompt_scores, "VALUES_AT_ONCE", 5 * VOCAB_SIZE)
    assert rows_of(cluster, asked("parts")) == whole
    assert max(sizes) == 5
    assert sum(sizes) == LENGTH  # the last row is sampled


@pytest.mark.parametrize("length", [1, 2, 256])
def test_the_prompt_alone_may_fill_the_context(cluster: LocalCluster, length: int) -> None:
    [[event]] = cluster.generate(asked("r", length))
    assert (event.token_ids, event.finish_reason) == ((), "length")
    assert len(event.prompt_logprobs) == length - 1
    assert cluster.scheduler.num_free_pages == 512


def test_each_choice_has_them_and_its_tokens_stay_the_same(cluster: LocalCluster) -> None:
    [plain] = cluster.generate(asked("plain", count=6, n=2, prompt_logprobs=None))
    [scored] = cluster.generate(asked("scored", count=6, n=2))
    assert [event.token_ids for event in scored] == [event.token_ids for event in plain]
    assert scored[0].prompt_logprobs == scored[1].prompt_logprobs
    assert len(scored[0].prompt_logprobs) == LENGTH - 1


@pytest.mark.parametrize("count", [1, 20, LENGTH - 2, LENGTH - 1])
def test_a_resumed_request_gets_the_rest(cluster: LocalCluster, count: int) -> None:
    [[whole]] = cluster.generate(asked(f"r{count}", count=5))
    given = Received((), num_prompt_logprobs=count)
    again = replace(asked(f"again{count}", count=5), received=(given,))
    [[rest]] = cluster.generate(again)
    assert rest.prompt_logprobs == whole.prompt_logprobs[count:]
    assert rest.prompt_start == (count if count < LENGTH - 1 else 0)
    assert rest.token_ids == whole.token_ids
    after = replace(asked(f"after{count}", count=5), received=(Received(whole.token_ids[:2]),))
    [[tail]] = cluster.generate(after)
    assert (tail.prompt_logprobs, tail.token_ids) == ((), whole.token_ids[2:])


def test_a_prompt_that_waits_for_an_expert_gets_each_once(open_cluster: OpenCluster) -> None:
    expected = rows_of(open_cluster(), asked("r"))
    cluster = open_cluster(limits=Limits(4, 8, 16), threaded=False)
    cluster.lose([(1, expert) for expert in range(8)])
    cluster.engine.submit(asked("r"))
    cluster.engine._commands.run(0.1)
    cluster.engine.step(cluster.scheduler.schedule())
    assert cluster.scheduler.parked()
    cluster.lose([])
    cluster.engine.start()
    [event] = cluster.result(asked("r"))
    assert event.prompt_logprobs == expected


def test_logits_that_are_not_finite_end_their_request_alone(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = prompt_scores.score

    def damaged(hidden_states: torch.Tensor, scored: Any, *others: Any) -> Any:
        hidden_states = hidden_states.clone()
        for part in scored:
            if part.chunk.sequence.request.request_id == "bad":
                hidden_states[part.rows.start] = torch.nan
        return score(hidden_states, scored, *others)

    monkeypatch.setattr("router.engine.engine.score", damaged)
    bad, good = asked("bad"), asked("good")
    cluster.engine.submit(bad)
    cluster.engine.submit(good)
    assert len(cluster.result(good)[0].prompt_logprobs) == LENGTH - 1
    with pytest.raises(NotFiniteError):
        cluster.result(bad)
