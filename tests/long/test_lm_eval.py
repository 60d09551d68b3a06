"""lm-eval, unchanged, against a deployment's HTTP and against transformers: equal scores.

lm-eval wants libraries that this project does not. So the test makes an environment of its own,
into which pip installs lm-eval from the package index. It takes torch and transformers from ours.
The task is of local files, and nothing else is read from a network.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

import deploy
from tests.cluster_fixture import TINY, ServedCluster

INSTALL_S, RUN_S = 600, 240
FOLDER = Path(deploy.__file__).parent / "models" / TINY
TASK = "local_questions"
NUM_QUESTIONS, NUM_CHOICES = 40, 4
TOLERANCE = 1e-4
"""The most that the log-likelihood of a choice may differ by."""
Answers = dict[int, list[float]]
"""The log-likelihoods of each question's choices."""


def run(*words: str, timeout_s: float, **variables: str) -> None:
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that has lm-eval, and of ours what lm-eval does not replace."""
    folder = tmp_path_factory.mktemp("lm-eval")
    run(sys.executable, "-m", "venv", str(folder), timeout_s=INSTALL_S)
    [own] = folder.glob("lib/python*/site-packages")
    (own / "ours.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    found = str(folder / "bin" / "python")
    install = (found, "-m", "pip", "install", "--quiet", "lm_eval[api,hf]>=0.4.9")
    run(*install, timeout_s=INSTALL_S)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of questions of random words, and its configuration for lm-eval."""
    folder = tmp_path_factory.mktemp("task")
    words = (FOLDER / "README.md").read_text(encoding="utf-8").split()
    draw = random.Random(0)

    def some(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    questions = [
        {
            "context": some(12),
            "choices": [some(1 + draw.randrange(5)) for _ in range(NUM_CHOICES)],
            "answer": draw.randrange(NUM_CHOICES),
        }
        for _ in range(NUM_QUESTIONS)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task))
    return folder


def lm_eval(python: str, place: Path, model: str, /, **model_args: object) -> tuple[Any, Answers]:
    """Run the task; returns its results, and the log-likelihoods."""
    out = place / model
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    words = ["--model", model, "--model_args", arguments, "--tasks", TASK]
    words += ["--include_path", str(place), "--output_path", str(out), "--log_samples"]
    home = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run(python, "-m", "lm_eval", *words, "--device", "cpu", timeout_s=RUN_S, **home)
    [results] = out.rglob("results_*.json")
    [samples] = out.rglob(f"samples_{TASK}_*.jsonl")
    answers = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        answers[sample["doc_id"]] = [float(pair[0]) for pair in sample["filtered_resps"]]
    return json.loads(results.read_text(encoding="utf-8"))["results"][TASK], answers


@pytest.mark.timeout(2 * INSTALL_S + 2 * RUN_S)
def test_lm_evals_scores_of_a_deployment_are_those_of_transformers(
    served: ServedCluster, python: str, place: Path
) -> None:
    ours, our_answers = lm_eval(
        python,
        place,
        "local-completions",
        model=TINY,
        base_url=f"{served.http_url}/v1/completions",
        tokenizer=FOLDER,
        add_bos_token=True,
        max_length=512,
        num_concurrent=4,
    )
    theirs, their_answers = lm_eval(python, place, "hf", pretrained=FOLDER, dtype="float32")
    assert len(our_answers) == len(their_answers) == NUM_QUESTIONS
    for number, answers in our_answers.items():
        assert len(answers) == NUM_CHOICES
        assert answers == pytest.approx(their_answers[number], abs=TOLERANCE)
    metrics = [f"{name},none" for name in ("acc", "acc_norm")]
    assert [ours[name] for name in metrics] == [theirs[name] for name in metrics]
    assert 0 < ours["acc,none"] < 1
