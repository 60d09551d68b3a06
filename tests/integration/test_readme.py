"""Every command block of README and docs is run as it stands, and shows its real output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.client import Client
from router.client.types import UnreachableError
from tests.cluster_fixture import wait_until
from tests.readme import (
    DOCUMENTS,
    ROOT,
    SLOW,
    Place,
    blocks,
    blocks_without_output,
    check_document,
    run_documents,
    serving,
)
from tests.serve_run import copy_with_ports, serve_cli

README = ROOT / "README.md"
GONE_S = 60.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One server for all documents."""
    with serving(tmp_path_factory.mktemp("documents")) as place:
        yield place


@pytest.fixture
def place_that_ends(place: Place) -> Place:
    """The server, for the last of the tests that use it."""
    return place


@pytest.mark.parametrize(
    "document",
    [document for document in run_documents() if document.name not in SLOW],
    ids=lambda document: document.name,
)
def test_a_document_shows_what_its_commands_print(document: Path, place: Place) -> None:
    check_document(document, place)


def test_the_commands_for_another_shell_work_as_written(place_that_ends: Place) -> None:
    place = place_that_ends
    text = README.read_text(encoding="utf-8")
    [block] = [b for b in blocks(text) if b.text.startswith("expertmesh deploy ")]
    commands = re.findall(r"^expertmesh (\w+)", block.text, re.MULTILINE)
    assert commands == ["deploy", "status", "logs", "stop"]
    with pytest.raises(AssertionError, match="Authentication required"):
        serve_cli("status", **place.variables)  # the token is on
    copy_with_ports(place.folder / "deploy", place.http_port, place.grpc_port)
    output = place.run(["bash", "-ec"], block.text)
    assert "expertmesh: serving deploy/cluster.yaml\n" in output
    assert "   ready   " in output
    assert " expertmesh.controller: " in output, output
    assert output.endswith("expertmesh: nothing is served any more\n")
    with Client(f"127.0.0.1:{place.grpc_port}", retry=None) as client:
        wait_until(lambda: does_not_answer(client), "nothing serves any more", GONE_S)


def does_not_answer(client: Client) -> bool:
    try:
        client.status()
    except UnreachableError:
        return True
    return False


def test_every_command_block_is_run_or_has_a_reason_not_to_be() -> None:
    assert len(DOCUMENTS) >= 11
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    assert sum(block.language == "console" for text in texts for block in blocks(text)) >= 10
    for document, text in zip(DOCUMENTS, texts, strict=True):
        assert blocks_without_output(text) == [], document
