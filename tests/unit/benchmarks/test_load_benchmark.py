"""The benchmark of loading: its checkpoints are served ones, and its sums are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import CONFIGS, config_of, make_family
from benchmarks.load import MAX_PEAK_RATIO, main, summary
from experts.checkpoint.checkpoint import open_checkpoint
from experts.families.registry import FAMILIES


def test_every_family_that_is_served_is_measured() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_familys_checkpoint_is_whole_and_of_the_size_of_the_others(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family)
    layers = "n_layers" if family == "dbrx" else "num_hidden_layers"
    monkeypatch.setattr(families, "config_of", lambda _: {**config, layers: 1})
    num_bytes = make_family(tmp_path, family)
    checkpoint = open_checkpoint(tmp_path)
    shape = checkpoint.shape
    assert (shape.hidden_size, shape.intermediate_size) == (families.WIDTH, families.INNER)
    assert (shape.num_experts, shape.layers, checkpoint.dtype) == (8, (0,), "bfloat16")
    assert num_bytes == sum(one.end - one.begin for one in checkpoint.tensors.values())


def test_all_actors_together_have_loaded_when_the_last_one_has() -> None:
    loading = {
        "a": {"load_s": 2.0, "weights_mb": 100.0, "peak_mb": 110.0, "code_mb": 5.0},
        "b": {"load_s": 4.0, "weights_mb": 50.0, "peak_mb": 60.0, "code_mb": 6.0},
    }
    assert summary(loading) == {
        "experts_mb": 150.0,
        "load_s": 4.0,
        "mb_per_s": 37.5,
        "peak_mb": 110.0,
        "share_mb": 100.0,
        "code_mb": 6.0,
        "peak_ratio": 1.2,
    }


@pytest.mark.parametrize(("ratio", "status"), [(MAX_PEAK_RATIO, 0), (MAX_PEAK_RATIO + 0.01, 1)])
def test_the_exit_status_says_when_an_actor_took_too_much(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ratio: float,
    status: int,
) -> None:
    loading = {"a": {"load_s": 1.0, "weights_mb": 100.0, "peak_mb": 100 * ratio, "code_mb": 0.0}}
    streams = {"32": {"tokens_per_s": 9.0}}
    measured = {"loading": loading, "streams": streams}
    monkeypatch.setattr("benchmarks.load.make_family", lambda folder, family: 10**8)
    monkeypatch.setattr("benchmarks.engine.measure", lambda *_: measured)
    monkeypatch.setattr("sys.argv", ["load", "--families", "mixtral"])
    assert main() == status
    assert ("missed" in capsys.readouterr().out) == bool(status)
