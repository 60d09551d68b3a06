"""Every command block of README and docs is run as it stands, and shows its real output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.readme import (
    DOCUMENTS,
    Place,
    blocks,
    blocks_without_output,
    rerun,
    run_documents,
    same,
    serving,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One server for all documents."""
    with serving(tmp_path_factory.mktemp("documents")) as place:
        yield place


@pytest.mark.timeout(240)
@pytest.mark.parametrize("document", run_documents(), ids=lambda document: document.name)
def test_a_document_shows_what_its_commands_print(document: Path, place: Place) -> None:
    markdown = document.read_text(encoding="utf-8")
    after = rerun(markdown, place)
    for old, new in zip(blocks(markdown), blocks(after), strict=True):
        assert same(old.text, new.text), f"shown:\n{old.text}\ncame:\n{new.text}"


def test_every_command_block_is_run_or_has_a_reason_not_to_be() -> None:
    assert len(DOCUMENTS) >= 11
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    assert sum(block.language == "console" for text in texts for block in blocks(text)) >= 10
    for document, text in zip(DOCUMENTS, texts, strict=True):
        assert blocks_without_output(text) == [], document
