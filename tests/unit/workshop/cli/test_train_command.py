"""``expertmesh train``: output, exit codes, and Ctrl-C at any moment."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from router.cli.app import app
from tests.unit.workshop.train.training_runs import tiny_settings
from workshop.train import trainer
from workshop.train.settings import load_config
from workshop.train.trainer import STATE_FILE, StepReport, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 8


@pytest.fixture
def words(grammar: Path, tmp_path: Path) -> list[str]:
    """The command of a run of a few steps, without its name."""
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(steps=STEPS)))
    return ["train", str(config), "--text", str(grammar), "--out", str(tmp_path / "out")]


def run(words: list[str]) -> Result:
    return CliRunner().invoke(app, words)


def on_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Have something happen in the middle of every step."""
    real = Trainer.step

    def step(self: Trainer) -> StepReport:
        act(self.steps_done + 1)
        return real(self)

    monkeypatch.setattr(Trainer, "step", step)


def test_it_trains_and_tells_the_figures(words: list[str], tmp_path: Path) -> None:
    result = run(words)
    assert result.exit_code == 0, result.stderr
    assert "held-out perplexity" in result.stdout
    assert "grammar.txt: perplexity" in result.stdout
    assert f"{STEPS}/{STEPS} loss" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_json_is_the_record_of_the_run(words: list[str], tmp_path: Path) -> None:
    result = run([*words, "--dense", "total", "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told == json.loads((tmp_path / "out" / "training.json").read_text())
    assert told["config"]["model"]["num_local_experts"] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({2: "--text", 3: "no.txt"}, "no.txt: cannot be read: No such file or directory"),
        ({1: "no.yaml"}, "no.yaml: cannot be read: No such file or directory"),
        ({}, "nothing to resume"),
    ],
)
def test_bad_usage_is_exit_code_2_and_one_line(
    words: list[str], changed: dict[int, str], message: str
) -> None:
    for place, word in changed.items():
        words[place] = word
    result = run([*words, "--resume"] if not changed else words)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_ctrl_c_saves_the_step_under_way_and_says_how_to_go_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run([*words[:-1], str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.stderr
    on_step(monkeypatch, lambda step: signal.raise_signal(signal.SIGINT) if step == 3 else None)
    stopped = run(words)
    assert stopped.exit_code == 130
    told = stopped.stderr.splitlines()[-1]
    assert told == "expertmesh: stopped; 3 steps are saved; run the same command with --resume"
    monkeypatch.undo()
    resumed = run([*words, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    [expected, got] = [load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out")]
    assert all(expected[name].equal(got[name]) for name in expected)


def test_ctrl_c_twice_ends_a_step_at_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    on_step(monkeypatch, interrupt)
    result = run(words)
    assert result.exit_code == 130
    assert "interrupted; the saved state is kept; run the same command with" in result.stderr
    assert state_steps(words, tmp_path) == 5


def test_ctrl_c_while_saving_leaves_a_whole_state(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = trainer.save_file, []

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        saves.append(path)
        real(tensors, path, metadata)
        if len(saves) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "save_file", save)
    result = run(words)
    assert result.exit_code == 130
    assert "the saved state is kept" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [STATE_FILE]
    assert state_steps(words, tmp_path) == 5


def test_ctrl_c_before_the_first_step_leaves_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "workshop.train.run.read_corpus", lambda *_: signal.raise_signal(signal.SIGINT)
    )
    result = run(words)
    assert result.exit_code == 130
    assert "interrupted; no state was saved" in result.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_evaluating_is_resumed_without_a_step(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workshop.train.run.score", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(words).exit_code == 130
    assert state_steps(words, tmp_path) == STEPS
    monkeypatch.undo()
    resumed = run([*words, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def state_steps(words: list[str], tmp_path: Path) -> int:
    """Return how many steps the saved state holds; it fails unless the state is whole."""
    from safetensors import safe_open

    assert load_config(Path(words[1]))
    with safe_open(tmp_path / "out" / STATE_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)
        return int(json.loads(file.metadata()["training"])["steps_done"])


def test_a_run_that_fails_is_exit_code_1_before_its_first_step(words: list[str]) -> None:
    result = run([*words[:-1], "/proc/model"])  # where root too may make nothing
    assert result.exit_code == 1
    assert "/proc/model: cannot be made" in result.stderr
    assert "loss" not in result.stderr
