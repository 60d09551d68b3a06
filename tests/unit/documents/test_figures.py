"""README's figures are those of a benchmark's output, and performance's tables name a command."""

from __future__ import annotations

import re
from collections import defaultdict
from decimal import Decimal

import pytest

from tests.readme import ROOT

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
ROW = re.compile(r"^\| `(\w+)` \| .*? \| (.* \| .*) \|$", re.MULTILINE)
OUTPUTS = ("benchmarks/RESULTS.md", "docs/performance.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sections(name: str) -> list[str]:
    return re.split(r"^##+ ", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)


def numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text)]


def outputs() -> dict[str, set[Decimal]]:
    """Return the numbers of each benchmark, by its name in a command of their section."""
    found: defaultdict[str, set[Decimal]] = defaultdict(set)
    for section in (section for name in OUTPUTS for section in sections(name)):
        for benchmark in re.findall(r"benchmarks[./](\w+)", section):
            found[benchmark].update(numbers(section))
    return found


@pytest.mark.parametrize(("benchmark", "figures"), ROW.findall(README))
def test_a_row_of_readme_has_the_figures_of_its_benchmark(benchmark: str, figures: str) -> None:
    known = outputs()[benchmark]
    for figure in numbers(figures):
        assert any(each.quantize(figure) == figure for each in known), f"{benchmark}: {figure}"


def test_every_table_of_performance_names_its_command() -> None:
    tables = [text for text in sections(OUTPUTS[1]) if re.search(r"^\|.*\d", text, re.MULTILINE)]
    assert len(tables) > 5
    without = [text.splitlines()[0] for text in tables if "benchmarks" not in text]
    assert without == ["Advice"], "which command gives these figures?"
