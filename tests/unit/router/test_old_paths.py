"""Import paths that stand in users' deployment files go on working for one release."""

from __future__ import annotations

import importlib

import pytest

OLD_AND_NEW = (
    ("router.preflight", "router.ops.startup.preflight", "PowerOfTwoChoicesRequestRouter"),
    ("router.otlp", "router.observability.otlp", "span_processors"),
)


@pytest.mark.parametrize(
    ("old", "new", "name"), OLD_AND_NEW, ids=[old for old, _, _ in OLD_AND_NEW]
)
def test_an_old_path_leads_to_what_the_new_one_has(old: str, new: str, name: str) -> None:
    found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)
