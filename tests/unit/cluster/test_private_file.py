"""Secret files: who may read one, write it, or put another in its place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster.private_file import exposure

STRANGER = 65_534


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    file = folder / "key.pem"
    file.write_text("secret")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_file_of_this_user_and_its_group_is_private(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert exposure(file) == ""
    assert bool(exposure(file, stat.S_IRWXG | stat.S_IRWXO)) == (mode == 0o640)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644])
def test_a_file_that_others_may_use_is_not(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert exposure(file) == f"may be used by other users (mode {mode:04o}); run: chmod 600 {file}"


def test_nor_is_one_in_a_folder_where_others_may_replace_it(file: Path, tmp_path: Path) -> None:
    file.parent.chmod(0o777)
    assert exposure(file) == f"may be replaced by other users; run: chmod o-w {file.parent}"
    link = tmp_path / "link"
    link.symlink_to(file)
    assert "may be replaced" in exposure(link)
    file.parent.chmod(0o1777)  # only its owner replaces a file there
    assert exposure(file) == exposure(link) == ""


@pytest.mark.parametrize("is_folder", [False, True])
def test_nor_is_one_of_another_user(
    file: Path, is_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat_of = Path.stat
    strange = file.parent if is_folder else file

    def changed(path: Path, **options: bool) -> os.stat_result:
        fields = list(stat_of(path, **options))
        if path == strange:
            fields[stat.ST_UID] = STRANGER
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", changed)
    assert f"user {STRANGER}" in exposure(file)
    assert str(strange) in exposure(file) or not is_folder
