"""Every command block of the README is run as it stands, and shows what really comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme import README, blocks, reason_elsewhere, rerun, same, serving

SHELL = ("console", "sh", "python")


@pytest.mark.timeout(240)
def test_the_readme_shows_what_its_commands_print(tmp_path: Path) -> None:
    markdown = README.read_text(encoding="utf-8")
    with serving(tmp_path) as place:
        after = rerun(markdown, place)
    for old, new in zip(blocks(markdown), blocks(after), strict=True):
        assert same(old.text, new.text), f"shown:\n{old.text}\ncame:\n{new.text}"


def test_every_command_block_is_run_or_has_a_reason_not_to_be() -> None:
    commands = [b for b in blocks(README.read_text(encoding="utf-8")) if b.language in SHELL]
    assert len([b for b in commands if b.language == "console"]) >= 4
    for block in commands:
        assert block.language != "sh" or reason_elsewhere(block), block.text
