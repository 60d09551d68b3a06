"""A router where transformers was imported before it."""

from __future__ import annotations

from tests.unit.router.model.test_lean_transformers import output_of


def test_a_process_that_has_imported_transformers_already_goes_on() -> None:
    program = "import transformers, router.model.model as m; print(m.transformers.__name__)"
    assert output_of(program) == "transformers"
