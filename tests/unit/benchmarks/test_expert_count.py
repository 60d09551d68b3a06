"""The benchmark of how many experts: its arithmetic, and tiny runs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import expert_count
from benchmarks.expert_count import Run, main, settings_of, summarize
from router.workshop.trainer import Trainer
from tests.unit.router.workshop.training_runs import tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    name: part for name, part in tiny_settings().items() if name not in ("seed", "gating")
}
TINY["model"] = {n: v for n, v in TINY["model"].items() if n != "num_local_experts"}


def test_gain_is_against_half_as_many_experts() -> None:
    runs = [
        Run(count, seed, nats + seed / 10, 100 * count, 50, 1.0)
        for count, nats in ((8, 3.0), (2, 4.0), (4, 3.4), (32, 2.9))
        for seed in (0, 1, 2)
    ]
    found = {s.num_experts: s for s in summarize(runs)}
    assert list(found) == [2, 4, 8, 32]
    assert found[4].mean_nats == pytest.approx(3.5)
    assert (found[4].lowest_nats, found[4].highest_nats) == pytest.approx((3.4, 3.6))
    assert found[4].gain_nats == pytest.approx(0.6)
    assert found[8].gain_nats == pytest.approx(0.4)
    assert found[2].gain_nats is None
    assert found[32].gain_nats is None


def test_only_the_number_of_experts_differs_between_configurations() -> None:
    few, many = (settings_of(n, 1, 9, expert_count.RECIPE).recipe() for n in (4, 32))
    assert (few["model"].pop("num_local_experts"), many["model"].pop("num_local_experts")) == (
        4,
        32,
    )
    assert few == many
    # All experts active: nothing to choose, so nothing to balance.
    weights = [settings_of(n, 1, 9, expert_count.RECIPE).gating.importance_weight for n in (2, 4)]
    assert weights == [0.0, 0.1]


def test_tiny_runs_give_a_table_a_plot_and_json_and_are_kept(
    grammar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "--text", str(grammar), "--experts", "2", "4", "--seeds", "2", "--steps", "4",
        "--runs", str(tmp_path / "runs"), "--plot", str(tmp_path / "plot.svg"),
    ]  # fmt: skip
    assert main([*words, "--json", str(tmp_path / "first.json")], TINY) == 0
    assert "held-out loss by number of experts" in capsys.readouterr().out
    first = json.loads((tmp_path / "first.json").read_text())
    assert {(run["num_experts"], run["seed"]) for run in first["runs"]} == {
        (2, 0), (2, 1), (4, 0), (4, 1),
    }  # fmt: skip
    two, four = first["summary"]
    # Two more experts a layer, of 3 * 16 * 16; active are but their 16 numbers in the gate.
    gates = 2 * 2 * 16
    assert four["num_parameters"] - two["num_parameters"] == 2 * 2 * 768 + gates
    assert four["num_active_parameters"] - two["num_active_parameters"] == gates
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    # What is kept is not trained again, and what is not is.
    trained: list[int] = []
    real = Trainer.step

    def step(self: Trainer) -> Any:
        trained.append(self.config.model.num_local_experts)
        return real(self)

    monkeypatch.setattr(Trainer, "step", step)
    [lost] = (tmp_path / "runs").glob("experts-4-seed-1-*.json")
    lost.unlink()
    assert main([*words, "--json", str(tmp_path / "second.json")], TINY) == 0
    assert trained == [4] * 4
    second = json.loads((tmp_path / "second.json").read_text())
    losses = [[run["heldout_nats"] for run in told["runs"]] for told in (first, second)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experts", "1"], "--experts must be at least 2"),
        (["--steps", "1"], "--steps at least 2"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--text", "x", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_that_is_not_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--text", "no.txt"]) == 2
    assert "no.txt: cannot be read: No such file or directory" in capsys.readouterr().err
