"""The mutants keep up with the code: each patch applies, and changes the product alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.world.mutants.find import FOLDER, ROOT, Patch, apply, patches

PRODUCT = ("cluster/", "experts/", "router/")
MIN_MUTANTS = 33


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.name)
def test_patch_applies_to_the_tree(patch: Patch) -> None:
    apply(patch.file, ROOT, check=True)


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.name)
def test_patch_has_a_story_and_changes_the_product(patch: Patch) -> None:
    lines = patch.file.read_text().splitlines()
    changed = [line.split()[2] for line in lines if line.startswith("diff --git ")]
    assert changed
    assert all(name.removeprefix("a/").startswith(PRODUCT) for name in changed)
    assert patch.story
    assert "\n" not in patch.story


def test_there_are_enough_mutants() -> None:
    assert len(patches()) >= MIN_MUTANTS


def test_patch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    patch = patches(["nan_passes"])[0]
    copy = tmp_path / "router/moe"
    copy.mkdir(parents=True)
    text = (ROOT / "router/moe/layer.py").read_text()
    (copy / "layer.py").write_text(text.replace("if is_finite:", "if is_whole:"))
    with pytest.raises(RuntimeError, match="does not apply"):
        apply(patch.file, tmp_path, check=True)


def test_applied_patch_changes_a_copy(tmp_path: Path) -> None:
    patch = patches(["nan_passes"])[0]
    shutil.copytree(ROOT / "router/moe", tmp_path / "router/moe")
    before = (tmp_path / "router/moe/layer.py").read_text()
    apply(patch.file, tmp_path)
    assert (tmp_path / "router/moe/layer.py").read_text() != before
    assert (ROOT / "router/moe/layer.py").read_text() == before


def test_unknown_mutant_is_named() -> None:
    with pytest.raises(ValueError, match="no mutant: nobody"):
        patches(["nobody"])
    assert FOLDER.is_dir()
