"""Multiple-choice questions scored as lm-eval scores them, against transformers and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from router.gateway.tokenizer import Tokenizer
from router.workshop.evaluate.choices import (
    Continuation,
    Question,
    continuations,
    read_questions,
    score_choices,
)
from router.workshop.evaluate.run import Served, Task, evaluate
from router.workshop.evaluate.scores import Ids, Scored
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway
from tests.unit.gateway_fakes import serve_grpc

QUESTIONS: list[dict[str, Any]] = [
    {"context": "the quick brown", "choices": ["fox", "dog and then", "lazy things"], "answer": 0},
    {"context": "over the  ", "choices": ["lazy dog", "quick"], "answer": 1},
    {"context": "", "choices": ["the", "other things there"], "answer": 1},
    {"context": "jumps", "choices": ["over", "there", "and", "dog"], "answer": 2, "id": 7},
]


class FixedScorer:
    """Gives each prompt a log probability for each of its tokens but the first: minus its id."""

    vocab_size = 1000
    context = 100

    def score(self, prompts: Iterable[Ids]) -> Iterator[Scored]:
        for ids in prompts:
            yield Scored(np.array([-float(token_id) for token_id in ids[1:]]))


def written(path: Path, questions: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions) + "\n")
    return path


def expected_figures(model: Any, folder: Path) -> tuple[float, float]:
    """Score the questions slowly, one choice at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hits, hits_norm = [], []
    for question in QUESTIONS:
        sums = []
        for choice in question["choices"]:
            context, text = question["context"].rstrip(), question["context"] + " " + choice
            ids = tokenizer(text)["input_ids"]
            start = len(tokenizer(context)["input_ids"])
            if not context:
                ids, start = [tokenizer.eos_token_id, *ids], 1
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            rows = logits.float().log_softmax(-1)
            sums.append(sum(rows[i - 1, ids[i]].item() for i in range(start, len(ids))))
        norms = [total / len(text) for total, text in zip(sums, question["choices"], strict=True)]
        hits.append(sums.index(max(sums)) == question["answer"])
        hits_norm.append(norms.index(max(norms)) == question["answer"])
    return sum(hits) / len(hits), sum(hits_norm) / len(hits)


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_that_of_transformers_in_process_and_served(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "model"
    model = save_mixtral(folder, seed=seed)
    path = written(tmp_path / "q.jsonl", QUESTIONS)
    task = Task([], [path])
    found = evaluate(folder, task, None, lambda *progress: None).questions["q.jsonl"]
    assert (found.acc, found.acc_norm) == expected_figures(model, folder)
    assert found.questions == len(QUESTIONS)
    cluster = LocalCluster(folder, identity="one")
    with serve_grpc(LocalGateway(folder, cluster)) as address:
        asked = Served(address, "m", 30.0)
        served = evaluate(folder, task, asked, lambda *progress: None).questions["q.jsonl"]
    cluster.close()
    assert served == found


def test_choices_count_by_their_tokens_or_their_characters() -> None:
    """-12 beats -13, but -13 of two characters beats -12 of one."""
    question = Question("c", ("a", "bb"), 1, "f:1")
    asked = [[Continuation((9, 12), 1), Continuation((9, 6, 7), 2)]]
    found = score_choices([question] * 2, asked * 2, FixedScorer(), lambda: None)
    assert (found.acc, found.acc_norm, found.acc_stderr) == (0.0, 1.0, 0.0)


def test_the_first_of_equal_choices_is_taken() -> None:
    question = Question("c", ("a", "b"), 0, "f:1")
    asked = [[Continuation((9, 5), 1), Continuation((9, 5), 1)]]
    assert score_choices([question], asked, FixedScorer(), lambda: None).acc == 1.0


def test_the_standard_error_is_that_of_a_mean() -> None:
    right, wrong = Question("c", ("a", "b"), 0, ""), Question("c", ("a", "b"), 1, "")
    asked = [[Continuation((9, 1), 1), Continuation((9, 5), 1)]] * 4
    found = score_choices([right, right, right, wrong], asked, FixedScorer(), lambda: None)
    assert found.acc == 0.75
    assert found.acc_stderr == pytest.approx(math.sqrt(0.25 / 4))


def test_spaces_after_a_context_belong_to_the_choice(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    question = Question("the quick ", ("fox", "dog"), 0, "f:1")
    [[first, _]] = continuations([question], tokenizer, 320, 256)
    assert tokenizer.decode(first.ids) == "the quick  fox"
    assert tokenizer.decode(first.ids[-first.count :]) == "  fox"


def test_other_keys_and_empty_lines_are_ignored(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", QUESTIONS)
    path.write_text("\n" + path.read_text() + "\n\n")
    assert [question.answer for question in read_questions(path)] == [0, 1, 1, 2]
    assert read_questions(path)[0].where == f"{path}:2"
