"""The document of the configuration has every key as the classes that read it have it."""

from __future__ import annotations

import re

from router.config.deployment import AppConfig
from tests.configuration import DOCUMENT, document_with, tables


def test_the_document_has_the_keys_as_they_are() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == document_with(tables(), document), "python -m tests.configuration --write"


def test_every_key_of_every_section_is_in_the_tables() -> None:
    schema = AppConfig.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = sorted(key for section in sections for key in section.get("properties", ()))
    assert len(keys) > 50
    assert sorted(re.findall(r"^\| `(\w+)(?:\[\])?` \|", tables(), re.MULTILINE)) == keys


def test_a_key_is_told_with_its_values_its_default_and_its_meaning() -> None:
    told = tables().splitlines()
    assert "| `threads` | integer, 1 to 256 | 1 | Compute threads of one router. |" in told
    assert "| `target_use` | number, above 0, at most 1 | 0.7 |" in "\n".join(told)
    assert "| `id` | text | required | The name that clients use. |" in told
    meaning = "Encrypts streams and links between hosts."
    assert f"| `tls` | [section](#expertstls) |  | {meaning} |" in told


def test_links_to_sections_lead_to_their_headings() -> None:
    headings = re.findall(r"^### (.*)$", tables(), re.MULTILINE)
    anchors = {re.sub(r"[^\w-]", "", heading) for heading in headings}
    assert len(anchors) == len(headings)
    links = re.findall(r"\(#([\w-]+)\)", tables())
    assert set(links) == anchors - {"args"}
