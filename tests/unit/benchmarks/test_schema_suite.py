"""The benchmark of the JSON Schema Test Suite, on a suite of three schemas."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.schema_suite import run

CASES = [
    {"description": "taken", "schema": {"enum": ["one", 2]}},
    {"description": "refused", "schema": {"$ref": "#"}},
    {"description": "also taken", "schema": {"type": "boolean"}},
]


def test_each_schema_is_taken_or_refused_and_its_answers_are_judged(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    counts = run(tmp_path, answers=3, seed=0)["counts"]
    assert counts == {"schemas taken": 2, "schemas refused": 1, "answers valid": 6}
