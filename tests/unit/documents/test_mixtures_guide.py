"""The document of fitted mixtures: its keys are those of the classes, and its examples are read."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from experts.checkpoint.mixture import open_mixture
from tests.local_mixture import LocalMixture
from tests.readme import blocks
from workshop.estimators.saved.fit_config import FitConfig, LearnerSettings, build, load_fit_config

GUIDE = Path(__file__).parents[3] / "docs" / "mixtures.md"


@pytest.mark.parametrize("section", [FitConfig, LearnerSettings])
def test_every_key_is_in_a_table_with_its_default_and_its_meaning(section: type[BaseModel]) -> None:
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    for name, field in section.model_fields.items():
        default = (
            "required" if field.is_required() else yaml.safe_dump(field.default).split("\n")[0]
        )
        default = "" if field.default in (None, {}) else default
        row = f"| `{name}` | {default} | {field.description} |"
        assert row in lines, row


def test_the_examples_are_configurations(tmp_path: Path) -> None:
    examples = [b.text for b in blocks(GUIDE.read_text(encoding="utf-8")) if b.language == "yaml"]
    assert len(examples) == 2
    for text in examples:
        file = tmp_path / "fit.yaml"
        file.write_text(text)
        build(load_fit_config(file), file)


def test_the_same_mixture_is_fitted_in_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [b.text for b in blocks(GUIDE.read_text(encoding="utf-8")) if b.language == "py"]
    making, fitting = codes
    assert len([line for line in fitting.splitlines() if line]) <= 5
    with chdir(tmp_path):
        exec(making, {})
        rows = np.loadtxt("pieces.csv", delimiter=",", skiprows=1)
        exec(fitting, {"X": rows[:, :2], "y": rows[:, 2]})
    assert float(capsys.readouterr().out.split()[0]) > 0.95
    served = LocalMixture(open_mixture(tmp_path / "pieces")).predict({"x": rows[:, :2]})
    assert np.corrcoef(served["mean"][:, 0], rows[:, 2])[0, 1] > 0.97
