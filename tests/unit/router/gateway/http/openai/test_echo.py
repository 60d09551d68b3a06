"""``echo`` and ``prompt_logprobs`` of completions, as lm-eval asks for them and reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from router.engine.scheduling.scheduler import Limits
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway
from tests.unit.http_calls import events
from tests.unit.router.engine.test_engine import prompt_of

PROMPTS = [prompt_of(length, length) for length in (9, 2, 30)]
TEXT = "the quick brown fox — jumps"


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


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(folder)
    yield cluster
    cluster.close()


@pytest.fixture
def gateway(folder: Path, cluster: LocalCluster) -> LocalGateway:
    return LocalGateway(folder, cluster)


def expected_logprobs(oracle: MixtralForCausalLM, ids: list[int]) -> torch.Tensor:
    """Return the log probabilities of all tokens after each of ``ids``."""
    with torch.inference_mode():
        logits = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def likelihood_payload(prompts: Any) -> dict[str, Any]:
    """The body that lm-eval's ``local-completions`` posts for log-likelihoods."""
    fixed = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    return {"prompt": prompts, **fixed}


def read_likelihoods(answer: dict[str, Any], context_lengths: list[int]) -> list[Any]:
    """Read (log-likelihood, is greedy) of each continuation as lm-eval does.

    The last token of a choice is the one that was generated, so it is left out.
    """
    found = []
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for choice, context in zip(choices, context_lengths, strict=True):
        own = choice["logprobs"]["token_logprobs"][context:-1]
        top = choice["logprobs"]["top_logprobs"][context:-1]
        is_greedy = all(mine == max(best.values()) for mine, best in zip(own, top, strict=True))
        found.append((sum(own), is_greedy))
    return found


def test_lm_eval_reads_transformers_likelihoods(
    gateway: LocalGateway, oracle: MixtralForCausalLM
) -> None:
    contexts = [5, 1, 29]
    greedy = [*PROMPTS[0], int(expected_logprobs(oracle, PROMPTS[0])[-1].argmax())]
    prompts = [*PROMPTS, greedy]
    answer = gateway.post(**likelihood_payload(prompts)).json()
    for ids, context, (total, is_greedy) in zip(
        prompts, [*contexts, 9], read_likelihoods(answer, [*contexts, 9]), strict=True
    ):
        rows = expected_logprobs(oracle, ids)
        targets = torch.tensor(ids[context:])
        own = rows[context - 1 : -1].gather(1, targets[:, None])
        assert total == pytest.approx(own.sum().item(), abs=1e-3)
        assert is_greedy == bool((rows[context - 1 : -1].argmax(-1) == targets).all())
    assert read_likelihoods(answer, [5, 1, 29, 9])[3][1]


@pytest.mark.parametrize("prompt", [TEXT, [TEXT], PROMPTS[0], [PROMPTS[0]]])
def test_every_shape_of_a_prompt_is_echoed(gateway: LocalGateway, prompt: Any) -> None:
    answer = gateway.post(**likelihood_payload(prompt)).json()
    [choice] = answer["choices"]
    is_text = TEXT in prompt
    ids = gateway.tokenizer.encode(TEXT) if is_text else PROMPTS[0]
    echoed = TEXT if is_text else gateway.tokenizer.decode(ids)
    plain = gateway.post(**{**likelihood_payload(prompt), "echo": False}).json()["choices"][0]
    assert choice["text"] == echoed + plain["text"]
    rows = choice["logprobs"]
    assert len(rows["tokens"]) == len(ids) + 1
    assert {len(column) for column in rows.values()} == {len(ids) + 1}
    assert rows["token_logprobs"][0] is rows["top_logprobs"][0] is None
    assert rows["token_logprobs"][-1] == plain["logprobs"]["token_logprobs"][0]
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    "asked", [{"echo": True, "logprobs": 1}, {"echo": True}, {"prompt_logprobs": 1}]
)
def test_no_new_token_is_needed(gateway: LocalGateway, asked: dict[str, Any]) -> None:
    answer = gateway.post(prompt=PROMPTS, max_tokens=0, n=2, **asked).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        ids = PROMPTS[choice["index"] // 2]
        assert choice["finish_reason"] == "length"
        assert choice["text"] == (gateway.tokenizer.decode(ids) if "echo" in asked else "")
        if "logprobs" in asked:
            assert len(choice["logprobs"]["token_logprobs"]) == len(ids)
        else:
            assert choice["logprobs"] is None
        if "prompt_logprobs" in asked:
            assert len(choice["prompt_logprobs"]) == len(ids)
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_as_vllms(gateway: LocalGateway, oracle: MixtralForCausalLM) -> None:
    ids = PROMPTS[2]
    choice = gateway.post(prompt=ids, prompt_logprobs=2, max_tokens=1).json()["choices"][0]
    first, *rows = choice["prompt_logprobs"]
    assert (first, choice["logprobs"], len(rows)) == (None, None, len(ids) - 1)
    expected = expected_logprobs(oracle, ids)
    for place, row in enumerate(rows):
        ranks = expected[place].argsort(descending=True).tolist()
        likeliest = [str(token_id) for token_id in ranks[:2]]
        own = str(ids[place + 1])
        assert set(row) == {*likeliest, own}
        for token_id, entry in row.items():
            assert entry["logprob"] == pytest.approx(
                expected[place, int(token_id)].item(), abs=1e-4
            )
            assert entry["rank"] == ranks.index(int(token_id)) + 1
            assert entry["decoded_token"] == gateway.tokenizer.token_text(int(token_id))


def test_tokens_of_one_text_do_not_hide_the_likeliest(gateway: LocalGateway) -> None:
    """Parts of characters have the same text, and lm-eval looks for the largest number."""
    body = {"prompt": PROMPTS[2], "max_tokens": 0, "echo": True, "logprobs": 20}
    choice = gateway.post(**body, prompt_logprobs=20).json()["choices"][0]
    for top, by_id in zip(
        choice["logprobs"]["top_logprobs"][1:], choice["prompt_logprobs"][1:], strict=True
    ):
        assert max(top.values()) == max(entry["logprob"] for entry in by_id.values())


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [chunk["choices"][0] for chunk in chunks]
    return {
        "text": "".join(part["text"] for part in parts),
        "logprobs": {
            name: [row for part in parts for row in part["logprobs"][name]]
            for name in parts[0]["logprobs"]
        },
    }


@pytest.mark.parametrize("lost_after", [None, 1, 2, 3, 4, 5])
def test_a_lost_router_changes_no_answer_and_no_stream(
    folder: Path, lost_after: int | None
) -> None:
    cluster = LocalCluster(folder, limits=Limits(4, 8, 16))  # the prompt takes several steps
    body = {**likelihood_payload(PROMPTS[2]), "max_tokens": 4, "ignore_eos": True}
    whole = LocalGateway(folder, cluster).post(**body).json()["choices"][0]
    streaming = LocalGateway(folder, cluster, lost_after=lost_after)
    chunks = events(streaming.post(**body, stream=True))
    body = {**likelihood_payload(PROMPTS[2]), "max_tokens": 4, "prompt_logprobs": 2}
    of_prompt = LocalGateway(folder, cluster).post(**body).json()["choices"]
    broken = LocalGateway(folder, cluster, lost_after=lost_after)
    assert broken.post(**body).json()["choices"] == of_prompt
    cluster.close()
    assert len(chunks) >= 2
    assert joined(chunks) == {"text": whole["text"], "logprobs": whole["logprobs"]}
