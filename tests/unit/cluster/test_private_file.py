"""Secret files: who may read one, write it, or put another in its place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from cluster.private_file import exposure

STRANGER = 65_534
STATUS = (
    *("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid"),
    *("st_size", "st_atime", "st_mtime", "st_ctime"),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    file = folder / "key.pem"
    file.write_text("secret")
    file.chmod(0o600)
    return file


@contextmanager
def changed(strange: Path, **fields: int) -> Iterator[None]:
    """Have one file another owner, group or mode, which only root could give it."""
    real_stat, identity = os.stat, strange.lstat()

    def look(path: Path, **options: bool) -> os.stat_result:
        status = real_stat(path, **options)
        if not os.path.samestat(status, identity):
            return status
        return os.stat_result([fields.get(name, getattr(status, name)) for name in STATUS])

    with (
        patch.object(os, "stat", look),
        patch.object(os, "lstat", partial(look, follow_symlinks=False)),
    ):
        yield


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_file_of_this_user_and_its_group_is_private(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert exposure(file) == ""
    assert bool(exposure(file, stat.S_IRWXG | stat.S_IRWXO)) == (mode == 0o640)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644, 0o620])
def test_a_file_that_others_may_use_is_not(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert exposure(file) == f"may be used by other users (mode {mode:04o}); run: chmod 600 {file}"


@pytest.fixture
def way(file: Path, tmp_path: Path) -> Path:
    """A path to the file over a link that leads to a folder by another link, in an open folder."""
    middle = tmp_path / "middle"
    middle.mkdir()
    (middle / "link").symlink_to("../secrets")
    (tmp_path / "link").symlink_to("middle/link")
    return tmp_path / "link" / file.name


@pytest.mark.parametrize(
    ("mode", "group", "who"),
    [
        (0o777, STRANGER, "go"),
        (0o757, STRANGER, "o"),
        (0o775, STRANGER, "g"),
        (0o775, 0, ""),  # root's
        (0o755, STRANGER, ""),
        (0o1777, STRANGER, ""),  # there only its owner replaces a file
    ],
)
def test_nor_is_one_to_which_a_way_leads_that_others_may_change(
    way: Path, tmp_path: Path, mode: int, group: int, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exposure(way) == ""
    folders = [tmp_path / "secrets", tmp_path / "middle", tmp_path]
    for folder in folders:
        with changed(folder, st_mode=stat.S_IFDIR | mode, st_gid=group):
            reason = exposure(way)
        assert bool(reason) == bool(who)
        if who:
            advice, _, path = reason.rpartition(" ")
            assert advice == f"may be replaced by other users; run: chmod {who}-w"
            assert Path(path).samefile(folder)


@pytest.mark.parametrize("strange", ["secrets/key.pem", "secrets", "link", "middle", "middle/link"])
def test_nor_is_one_that_belongs_to_another_user_or_is_found_by_way_of_one(
    way: Path, tmp_path: Path, strange: str
) -> None:
    with changed(tmp_path / strange, st_uid=STRANGER):
        reason = exposure(way)
    if strange == "secrets/key.pem":
        assert reason == f"belongs to user {STRANGER}; run: chown {os.geteuid()} {way}"
        return
    who, _, path = reason.removesuffix("; move the file").partition(", the owner of ")
    assert who == f"may be replaced by user {STRANGER}"
    assert os.path.samestat(os.lstat(path), os.lstat(tmp_path / strange))
