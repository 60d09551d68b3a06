"""Documents whose commands make models are run as they stand, and show their real output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme import SLOW, check_document, run_documents, serving


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "document",
    [document for document in run_documents() if document.name in SLOW],
    ids=lambda document: document.name,
)
def test_a_document_shows_what_its_commands_print(document: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as place:
        check_document(document, place)
