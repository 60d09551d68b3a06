"""The guide of the workshop: its commands have all options that it names, its Python runs."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import pytest

from tests.readme import ROOT, blocks
from tests.unit.workshop.folders.edits import write_letters
from workshop.folders.merge.dense import DENSE_CLASSES, WITHOUT_DENSE

GUIDE = (ROOT / "docs" / "workshop.md").read_text(encoding="utf-8")
NAMES = {
    "mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE", "olmoe": "OLMoE",
    "dbrx": "DBRX", "gpt_oss": "GPT-OSS", "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3", "grok-1": "Grok-1", "grok": "Grok-1",
}  # fmt: skip


def test_the_python_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [block.text for block in blocks(GUIDE) if block.language == "py"]
    write_letters(tmp_path / "text.txt", 25_000)
    with chdir(tmp_path):
        exec(code, {})
    assert float(capsys.readouterr().out) > 1
    assert (tmp_path / "mesh-6" / "README.md").exists()


def test_the_table_of_dense_classes_has_every_family() -> None:
    rows = [line for line in GUIDE.splitlines() if line.startswith("| ")]
    for family in DENSE_CLASSES | WITHOUT_DENSE:
        [row] = [row for row in rows if NAMES[family] in row.split("|")[1]]
        assert (row.split("|")[2].strip() == "none") is (family in WITHOUT_DENSE)
