"""The mutants keep up with the code: each patch applies, and changes the product alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.world.mutants.find import ROOT, Patch, apply, patches

PRODUCT = ("cluster/", "experts/", "router/")
MIN_MUTANTS = 55


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.name)
def test_patch_applies_to_the_tree_has_a_story_and_changes_the_product(patch: Patch) -> None:
    apply(patch.file, ROOT, check=True)
    lines = patch.file.read_text().splitlines()
    changed = [line.split()[2] for line in lines if line.startswith("diff --git ")]
    assert changed
    assert all(name.removeprefix("a/").startswith(PRODUCT) for name in changed)
    assert patch.story
    assert "\n" not in patch.story


def test_applied_patch_changes_a_copy_that_it_fits(tmp_path: Path) -> None:
    patch, name = patches(["nan_passes"])[0], "router/moe/layer.py"
    (tmp_path / "router/moe").mkdir(parents=True)
    before = (ROOT / name).read_text()
    (tmp_path / name).write_text(before.replace("if is_finite:", "if is_whole:"))
    with pytest.raises(RuntimeError, match="does not apply"):
        apply(patch.file, tmp_path, check=True)
    shutil.copy(ROOT / name, tmp_path / name)
    apply(patch.file, tmp_path)
    assert (tmp_path / name).read_text() != before
    assert (ROOT / name).read_text() == before


def test_there_are_enough_mutants_and_an_unknown_one_is_named() -> None:
    assert len(patches()) >= MIN_MUTANTS
    with pytest.raises(ValueError, match="no mutant: nobody"):
        patches(["nobody"])
