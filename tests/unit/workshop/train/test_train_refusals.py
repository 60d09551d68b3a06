"""What training refuses, and that a run which breaks off leaves what was there before."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import ConfigError
from tests.unit.workshop.train.training_runs import (
    STEPS,
    BrokenOffError,
    break_off_after,
    tiny_config,
    tiny_settings,
)
from workshop.texts import read_corpus
from workshop.train.corpus import train_tokenizer
from workshop.train.run import Watcher, train
from workshop.train.settings import TrainingConfig, TrainingError, TrainingFailedError, load_config
from workshop.train.trainer import STATE_FILE, StepReport

pytestmark = pytest.mark.usefixtures("one_thread")


def test_unknown_key_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(stepz=3)))
    with pytest.raises(TrainingError, match=r"train\.yaml: optimization\.stepz: Extra inputs"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 must be at most"),
        ("model", {"num_experts_per_tok": 4}, "leaves no choice; give gating noisy: false"),
        ("model", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
        ("gating", {"noisy": False}, "load_weight 0.1 needs noisy: true"),
        ("gating", {"groups": {"tokens": 7, "capacity_factor": 1}},
         "7 must divide batch_size times sequence_length, 128"),
        ("one", {"groups": {"tokens": 32, "capacity_factor": 1, "random_second": True}},
         r"needs num_experts_per_tok 2 \(given: 1\)"),
        ("optimization", {"warmup_steps": 40}, "must be less than steps 40"),
        ("optimization", {"sequence_length": 65}, "at most max_position_embeddings 64"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together(
    section: str, changes: dict[str, Any], message: str
) -> None:
    raw = tiny_settings()
    if section == "one":
        section, raw["model"]["num_experts_per_tok"] = "gating", 1
    raw[section] |= changes
    with pytest.raises(ValueError, match=message):
        TrainingConfig.model_validate(raw)


def test_empty_short_and_binary_texts_are_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content, message in (
        (b" \n\n", r"text\.txt: the text is empty"),
        (b"one line\n", r"text\.txt: the text is too short to hold any of it out"),
        (b"\xff\xfe\x00", r"text\.txt: cannot be read as UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_corpus([path], holdout_every_blocks=2)


def test_two_texts_of_one_name_are_refused(grammar: Path) -> None:
    with pytest.raises(ConfigError, match=r"another text is called grammar\.txt too"):
        read_corpus([grammar, grammar], holdout_every_blocks=2)


def test_vocabulary_must_fit_the_text() -> None:
    with pytest.raises(TrainingError, match="vocab_size 257 must be at least 258"):
        train_tokenizer(["a a a"], 257)
    with pytest.raises(TrainingError, match="vocab_size 9000 is more than the text yields"):
        train_tokenizer(["a a a"], 9000)


def test_resume_refuses_no_state_and_another_configuration(grammar: Path, tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(config, [grammar], tmp_path, resume=True)
    with pytest.raises(BrokenOffError):
        train(config, [grammar], tmp_path, watcher=Watcher(on_step=break_off_after(5)))
    with pytest.raises(TrainingError, match="holds an unfinished run"):
        train(config, [grammar], tmp_path)
    with pytest.raises(TrainingError, match="another configuration or text"):
        train(tiny_config(learning_rate=0.5), [grammar], tmp_path, resume=True)
    (tmp_path / STATE_FILE).write_bytes(b"torn")
    with pytest.raises(TrainingError, match="is not a training state"):
        train(config, [grammar], tmp_path, resume=True)


def test_a_folder_with_other_files_and_a_file_are_refused_untouched(
    grammar: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(TrainingError, match=r"holds other files \(thesis\.tex\)"):
        train(tiny_config(), [grammar], tmp_path)
    with pytest.raises(TrainingError, match=r"thesis\.tex: is a file"):
        train(tiny_config(), [grammar], tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_too_little_room_is_told_before_the_first_step(
    grammar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    reports: list[StepReport] = []
    with pytest.raises(TrainingFailedError, match="0 MB are free on its disk, and training needs"):
        train(tiny_config(), [grammar], tmp_path, watcher=Watcher(on_step=reports.append))
    assert reports == []


def test_a_disk_that_fills_while_saving_leaves_the_state_before(
    grammar: Path, tmp_path: Path, small_files: Any
) -> None:
    def fill_after_the_first(report: StepReport) -> None:
        if report.steps_done == 5:
            small_files(10_000)

    refused = r"the state of step 10 cannot be written: .*--resume"
    with pytest.raises(TrainingFailedError, match=refused):
        train(tiny_config(), [grammar], tmp_path, watcher=Watcher(on_step=fill_after_the_first))
    assert os.listdir(tmp_path) == [STATE_FILE]
    small_files(resource.RLIM_INFINITY)
    reports: list[StepReport] = []
    watcher = Watcher(on_step=reports.append)
    train(tiny_config(), [grammar], tmp_path, resume=True, watcher=watcher)
    assert [report.steps_done for report in reports] == list(range(6, STEPS + 1))


def test_a_disk_that_fills_at_the_end_leaves_the_state(
    grammar: Path, tmp_path: Path, small_files: Any
) -> None:
    def fill(phase: str) -> None:
        if phase == "evaluating":
            small_files(10_000)

    with pytest.raises(TrainingFailedError, match=r"the checkpoint cannot be written: .*--resume"):
        train(tiny_config(steps=3), [grammar], tmp_path, watcher=Watcher(on_phase=fill))
    assert os.listdir(tmp_path) == [STATE_FILE]
    small_files(resource.RLIM_INFINITY)
    train(tiny_config(steps=3), [grammar], tmp_path, resume=True)
    assert (tmp_path / "model.safetensors").exists()


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(
    grammar: Path, tmp_path: Path
) -> None:
    reports: list[StepReport] = []
    config = tiny_config(learning_rate=1e18, final_learning_rate=1e18, max_grad_norm=1e18)
    with pytest.raises(TrainingFailedError, match="the loss is nan, so the run has diverged"):
        train(config, [grammar], tmp_path, watcher=Watcher(on_step=reports.append))
    assert 0 < len(reports) < 5
    assert os.listdir(tmp_path) == []
