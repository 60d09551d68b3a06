"""How the README's blocks are found, run and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme import (
    Block,
    Place,
    Step,
    blocks,
    blocks_without_output,
    reason_elsewhere,
    rerun,
    same,
    shown,
    steps,
)

MARKDOWN = """# A title

## Use

```console
$ echo one
one
$ printf 'a\\n\\nb\\n' \\
    | tail -1
b
$ true
```

Text.

```python
print(6 * 7)
```

```
41
```

```sh
pip install . && exit 1
```
"""


@pytest.mark.timeout(60)
def test_what_blocks_print_takes_the_place_of_what_is_shown(tmp_path: Path) -> None:
    after = rerun(MARKDOWN, Place(1, 2, tmp_path))
    assert after == MARKDOWN.replace("\n41\n", "\n42\n")
    assert rerun(after, Place(1, 2, tmp_path)) == after
    assert rerun("no block", Place(1, 2, tmp_path)) == "no block"
    wrong = MARKDOWN.replace("\none\n", "\ntwo\nthree\n")
    assert rerun(wrong, Place(1, 2, tmp_path)) == after
    assert same(blocks(wrong)[0].text, blocks(after)[0].text) is False


def test_ports_are_those_of_the_place_and_shown_as_the_readme_has_them(tmp_path: Path) -> None:
    place = Place(23456, 24567, tmp_path)
    text = "```console\n$ echo $EXPERTMESH_ADDRESS localhost:8000 | tr 5 5\nx\n```\n"
    assert "\n127.0.0.1:9000 localhost:8000\n" in rerun(text, place)


def test_numbers_ids_and_the_width_of_columns_do_not_matter_and_words_do() -> None:
    assert same("pid 12, 3.5 s\n", "pid 4567, 12 s\n")
    assert same('{"id": "cmpl-bdb23127-59db-4855"}', '{"id": "cmpl-00000000-aaaa-1111"}')
    assert same("│ a │ b 1 │\n├───┤\n", "│ a  │ b │\n│    │ 23 │\n├────┼\n")
    assert not same("one\ntwo\n", "one\n")
    assert not same("And the LORD said\n", "And the king said\n")
    assert not same("│ a ─ b │\n", "│ a ─ c │\n")


def test_blocks_and_their_commands_are_found_with_what_stands_below_each() -> None:
    found = blocks(MARKDOWN)
    assert [block.language for block in found] == ["console", "python", "", "sh"]
    assert all(MARKDOWN[block.begin :].startswith(block.text) for block in found)
    assert blocks("no block") == []
    assert steps(found[0].text) == [
        Step("echo one", "one\n"),
        Step("printf 'a\\n\\nb\\n' \\\n    | tail -1", "b\n"),
        Step("true", ""),
    ]
    assert shown(steps(found[0].text)) == found[0].text
    with pytest.raises(ValueError, match="begins with a command"):
        steps("output without a command\n")


def test_blocks_that_are_not_run_have_a_reason_or_are_found() -> None:
    assert reason_elsewhere(Block("sh", "pip install . && serve run\n", 0))
    assert reason_elsewhere(Block("console", "$ expertmesh status\n", 0)) is None
    assert blocks_without_output(MARKDOWN) == blocks_without_output("no block") == []
    for before, after, language in (
        ("```\n41\n```", "", "python"),
        ("pip install . && exit 1", "expertmesh status", "sh"),
    ):
        [block] = blocks_without_output(MARKDOWN.replace(before, after))
        assert block.language == language
