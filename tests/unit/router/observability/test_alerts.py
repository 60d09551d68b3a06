"""The alert rules: Prometheus can read them, and they ask for what the metrics have."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import promql_parser
import pytest
import yaml

import deploy
from cluster.errors import Code
from router.observability import catalogue

RULES: list[dict[str, Any]] = yaml.safe_load(
    files(deploy).joinpath("dashboards", "alerts.yml").read_text("utf-8")
)["groups"][0]["rules"]
FAMILIES = {f.name: f for f in vars(catalogue).values() if isinstance(f, catalogue.Family)}
OF_SAMPLES = re.compile(r"_(total|bucket|sum|count)$")


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_a_rule_asks_for_samples_that_there_are(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    if "for" in rule:
        promql_parser.parse_duration(rule["for"])
    expr = str(promql_parser.parse(rule["expr"]))
    selectors = re.findall(r"(expertmesh_\w+)(?:\{([^}]*)\})?", expr)
    assert selectors
    for name, matchers in selectors:
        family = FAMILIES.get(name) or FAMILIES[OF_SAMPLES.sub("", name)]
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            assert label in family.labels
            if label == "code":
                assert set(value.split("|")) <= set(Code)
        told = re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))
        assert set(told) <= set(family.labels)
