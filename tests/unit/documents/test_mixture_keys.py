"""The document of mixtures: its example is a mixture, and it has every key as the classes do."""

from __future__ import annotations

import re

import yaml

from experts.mixture.spec import MixtureSpec
from tests.mixture_keys import DOCUMENT, document_with, tables


def test_the_document_has_the_keys_as_they_are() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == document_with(tables(), document), "python -m tests.mixture_keys --write"


def test_every_key_of_every_part_is_in_the_tables_with_its_meaning() -> None:
    schema = MixtureSpec.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = {key for section in sections for key in section.get("properties", ())} - {"kind"}
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", tables(), re.MULTILINE)
    assert {name for name, _ in rows} >= keys
    assert all(meaning.strip() for _, meaning in rows)


def test_the_example_is_a_mixture() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    [example] = re.findall(
        r"<!-- mixture example: begin -->\n```yaml\n(.*?)```\n<!-- mixture example: end -->",
        document,
        re.DOTALL,
    )
    spec = MixtureSpec.model_validate(yaml.safe_load(example))
    assert spec.expert_names == ("round", "straight", "rest")
    assert spec.combine.classes[:2] == ("0", "1")
